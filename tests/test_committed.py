"""What is committed packed gives the numbers of its table: nothing is trained here."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from xcl.deploy import load
from xcl.evaluate import evaluate, main, named_data
from xcl.paper.gaze import GazeParams, GazeSection
from xcl.paper.imagenet import ImagenetParams, ImagenetSection
from xcl.paper.yours_regression import RegressionParams, RegressionSection
from xcl.runtime import RuntimeConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / 'outputs').glob('*/*/packed.json'))
CHECKED = {'digits'}  # sets that need no folder
CPU = RuntimeConfig('cpu', progress=False)
LIMIT = 5_000_000, 30_000_000  # bytes: of a file, of all of them


def networks(folder):
    "Every student and teacher in a folder's packed.json, with the name of the data."
    found = json.loads((folder / 'packed.json').read_text())
    return [(found['data'], one) for one in found['networks']]


def recorded(folder, one):
    "The number of the folder's records."
    (path,) = folder.glob('*records.json')
    lines = json.loads(path.read_text())['records']
    same = dict(row=one['row'], seed=one['seed'], metric=one['metric'])
    (value,) = (line['value'] for line in lines if same.items() <= line.items())
    return value


def tolerance(metric, value):
    "An accuracy is that of the table; another score may differ by 0.05%."
    return 0.005 if metric == 'top1' else 5e-4 * value


def section_data(folder):
    "The data of the first seed of a demo whose set has no name on the command line."
    if folder.parent.name == 'gaze':
        return GazeSection('gaze', GazeParams.of(device='cpu')).data(1)
    if folder.parent.name == 'imagenet':
        given = yaml.safe_load((folder / 'params.yaml').read_text()) | dict(device='cpu')
        del given['data']  # the digest
        return ImagenetSection('imagenet', ImagenetParams.of(**given)).photos
    return RegressionSection('yours_regression', RegressionParams.of(device='cpu')).images


def test_there_are_packed_networks():
    assert FOLDERS and any(data in CHECKED for f in FOLDERS for data, _ in networks(f))


def case(folder):
    "Photographs are rendered for a minute and more."
    marks = [pytest.mark.slow] if folder.parent.name == 'imagenet' else []
    return pytest.param(folder, marks=marks, id=f'{folder.parent.name}-{folder.name}')


@pytest.mark.parametrize('folder', map(case, FOLDERS))
def test_evaluate_gives_the_number_of_the_table(folder):
    "Through the command line's own function, as a reader would call it."
    for data, one in networks(folder):
        paths = [str(folder / file) for file in one['files']]
        if data in CHECKED:
            score = main([*paths, data, '--device', 'cpu'])
        else:
            score = evaluate([load(path)[0] for path in paths], section_data(folder), CPU)
        value, metric = recorded(folder, one), one['metric'].removeprefix('teacher_')
        assert abs(score[metric] - value) < tolerance(metric, value)


def test_the_shell_prints_the_number():
    folder = ROOT / 'outputs' / 'yours' / 'demo'
    data, one = networks(folder)[0]
    words = [
        sys.executable,
        '-m',
        'xcl.evaluate',
        folder / one['files'][0],
        data,
        '--device',
        'cpu',
    ]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert f'{one["metric"]}: {recorded(folder, one):.4g}' in done.stdout


def test_a_network_of_another_table_is_told_apart():
    "The comparison can fail: an untrained network does not give the number."
    folder = ROOT / 'outputs' / 'yours' / 'demo'
    data, one = networks(folder)[0]
    net, meaning = load(folder / one['files'][0])
    digits = named_data(data, '', meaning, RuntimeConfig('cpu'))
    net.fc.weight.data.zero_()
    assert abs(evaluate(net, digits, RuntimeConfig('cpu'))['top1'] - recorded(folder, one)) > 20


def test_they_are_small():
    "Equal files count once, as git keeps them once: the same student stands in several tables."
    paths = [*(ROOT / 'outputs').glob('*/*/*.xcl')]
    files = {p.read_bytes() for p in paths if 'runs' not in p.relative_to(ROOT).parts}
    assert max(map(len, files)) < LIMIT[0] and sum(map(len, files)) < LIMIT[1]


def test_committed_files_have_short_names_and_tables_that_pandas_reads():
    files = [
        p
        for p in (ROOT / 'outputs').rglob('*')
        if p.is_file() and 'runs' not in p.relative_to(ROOT).parts
    ]
    assert len(files) > 100 and max(len(p.name) for p in files) <= 60
    for path in (p for p in files if p.suffix == '.csv'):
        assert not path.read_text(encoding='utf-8').startswith('#'), f'{path}: a caption line'
        assert len(pd.read_csv(path)), path
