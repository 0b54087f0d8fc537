"""The short form of benchmarks/soak.py, whose long form has its figures in outputs/benchmarks/soak.json."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_kills_bad_inputs_and_damaged_files(tmp_path):
    words = [
        '--kills',
        '4',
        '--kinds',
        'resnet18 CutMix',
        '--inputs',
        '200',
        '--files',
        '200',
        '--seed',
        '7',
        '--out',
    ]
    line = [sys.executable, ROOT / 'benchmarks' / 'soak.py', *words, tmp_path / 'soak.json']
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((tmp_path / 'soak.json').read_text())
    assert found['kills']['kills'] >= 4 and found['kills']['ends'] >= 1
    assert found['inputs']['parameters'] + found['inputs']['configs'] == 200
    assert found['files']['images'] + found['files']['weights'] == 200
