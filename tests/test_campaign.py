"benchmarks/campaign.py, tiny: what it packs is found as finished elsewhere."

import json
import os
import subprocess
import sys
import tarfile

import pytest

from xcl.paper.cifar import CifarSection, ResNet18Params
from xcl.runs import Run


@pytest.mark.slow
def test_packed_runs_are_found_elsewhere(root, tmp_path, xcl_home):
    line = [
        sys.executable,
        root / 'benchmarks' / 'campaign.py',
        '--tiny',
        '--out',
        tmp_path / 'out',
    ]
    env = {**os.environ, 'XCL_HOME': str(tmp_path / 'there')}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / 'out' / 'gauges.json').read_text())
    assert found['budget'] == 0.005
    for archive in (tmp_path / 'out').glob('*.tar'):
        with tarfile.open(archive) as tar:
            tar.extractall(xcl_home, filter='data')
    given = dict(preset='smoke', device='cpu', width=4, seeds=2, members=2, budget=0.005)
    exp = CifarSection('resnet18', ResNet18Params.of(**given))
    assert all(Run(c).done for configs in exp.grid.values() for c in configs)
    assert set(exp.run().table().row) > {'ERM', 'KD', 'XCL-Mix'}
