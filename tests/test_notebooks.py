"""Experiment notebooks as a user runs them: at preset smoke, and with slips.

Each notebook is executed once: gaze by README's command, through papermill and a Jupyter kernel; the others
in a process that has imported PyTorch already. What a run writes goes below XCL_HOME.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from children import execute

ROOT = Path(__file__).resolve().parent.parent
GAZE = ROOT / 'nbs' / 'gaze.ipynb'
SCRATCH = ROOT / 'nbs' / 'from_scratch.ipynb'  # plain PyTorch, without this package
EXPERIMENTS = sorted({*(ROOT / 'nbs').glob('*.ipynb')} - {SCRATCH})
COLLECTING = {
    'results',
    'few_images',
    'shipping',
}  # experiments that train nothing, but show what others have trained
TIMEOUT = 300  # seconds for one cell

each = pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda o: o.stem)


@pytest.fixture(scope='module', autouse=True)
def this_environment(session_home):
    "Programs and kernel of the environment that runs pytest, whichever `python3` kernel the user has."
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('PATH', os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
        mp.setenv('JUPYTER_PATH', str(Path(sys.prefix) / 'share' / 'jupyter'))
        mp.setenv('OMP_NUM_THREADS', '1')
        yield


def outputs_of_checkout():
    "What lies in outputs/, ignored or not, and when it was written."
    paths = [p for p in (ROOT / 'outputs').rglob('*') if p.is_file()]
    paths = [p for p in paths if 'runs' not in p.relative_to(ROOT).parts]
    return {p: p.stat().st_mtime_ns for p in paths}


def git_status():
    words = ['git', 'status', '--porcelain', '--', 'outputs', 'nbs']
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout


def papermill_command(words, home, cwd):
    "A command line, run by a shell in `cwd`."
    env = {**os.environ, 'XCL_HOME': str(home)}
    done = subprocess.run(
        words, shell=True, cwd=cwd, env=env, capture_output=True, text=True, timeout=2 * TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module', params=EXPERIMENTS, ids=lambda o: o.stem)
def smoke(request, tmp_path_factory):
    "An experiment, executed with seed 7 in a fresh home."
    nb = request.param
    tmp, trains = tmp_path_factory.mktemp(nb.stem), nb.stem not in COLLECTING
    git, before = git_status(), outputs_of_checkout()
    if nb.stem == 'gaze':  # literally, in a folder that sees the checkout's nbs/
        (tmp / 'nbs').symlink_to(ROOT / 'nbs')
        command = 'papermill nbs/gaze.ipynb out.ipynb -p seed 7 -p preset smoke -p device cpu'
        papermill_command(command, tmp / 'home', tmp)
    else:
        device = dict(device='cpu') if trains else {}
        execute(nb, tmp / 'out.ipynb', tmp / 'home', preset='smoke', seed=7, **device)
    page = json.loads((tmp / 'out.ipynb').read_text())
    cells = [c for c in page['cells'] if c['cell_type'] == 'code']
    return SimpleNamespace(
        name=nb.stem,
        trains=trains,
        home=tmp / 'home',
        papermill=page['metadata']['papermill'],
        cells=cells,
        outputs=[o for c in cells for o in c['outputs']],
        git=(git, git_status()),
        files=(before, outputs_of_checkout()),
    )


def texts(outputs):
    "All that an executed notebook says, images left out."
    kinds = 'text/plain', 'text/html', 'text/markdown'
    texts = [o.get('text', '') for o in outputs]
    texts += [o.get('data', {}).get(k, '') for o in outputs for k in kinds]
    return '\n'.join(''.join(t) for t in texts)


def test_every_cell_ran(smoke):
    assert not [o['evalue'] for o in smoke.outputs if o['output_type'] == 'error']
    assert smoke.cells[-1]['outputs'] and len(smoke.outputs) >= 5


def test_the_seed_arrives(smoke):
    "In the configs of all that was trained: seeds 7, 8, ... and teachers 7001, 7002, ..."
    configs = [json.loads(p.read_text()) for p in smoke.home.rglob('config.json')]
    assert bool(configs) == smoke.trains, 'something was trained' if configs else 'nothing was'
    if not smoke.trains:
        return
    seeds = {o['seed'] for c in configs for o in (c, *c.get('teachers', ())) if 'seed' in o}
    assert 7 in seeds and {s if s < 1000 else s // 1000 for s in seeds} <= {7, 8, 9}, seeds
    splits = {c['data']['split'] for c in configs if c.get('data', {}).get('kind') == 'EyeData'}
    assert splits <= {7, 8, 9}, 'a seed draws people'


def test_there_are_figures_and_tables(smoke):
    data = [o.get('data', {}) for o in smoke.outputs]
    pngs = [base64.b64decode(d.get('image/png', ''))[:4] for d in data]
    assert b'\x89PNG' in pngs, 'no figure'
    assert [d for d in data if '<table' in ''.join(d.get('text/html', ''))], 'no table'
    assert 'SMOKE - not a result' in texts(smoke.outputs), 'a smoke run says that it is none'


def test_there_is_a_summary(smoke):
    "Three lines of what was seen, at the top and at the end."
    lines = [t for o in smoke.outputs if (t := ''.join(o.get('data', {}).get('text/markdown', '')))]
    if smoke.trains:
        assert len(lines) >= 2 and lines[0] == lines[-1], 'the summary stands at both ends'


def test_it_is_quiet(smoke):
    bar = r'\d+%\||\d(it|step|s|person)/(s|it|step|person)\b'
    assert not re.search(bar, texts(smoke.outputs)), 'a progress bar where nobody looks'
    stderr = ''.join(''.join(o['text']) for o in smoke.outputs if o.get('name') == 'stderr')
    assert not stderr, stderr[:2000]


def test_outputs_go_below_home(smoke):
    assert smoke.git[0] == smoke.git[1] and smoke.files[0] == smoke.files[1], 'a run wrote here'
    found = {p.suffix for p in smoke.home.rglob('*')}
    assert {'.csv', '.png', '.yaml'} <= found, 'tables, figures and parameters are files, too'


def test_the_parameters_are_recorded(smoke):
    given = dict(preset='smoke', seed=7) | (dict(device='cpu') if smoke.trains else {})
    assert smoke.papermill['parameters'] == given


def test_from_scratch_shows_what_it_says(monkeypatch):
    "Its cells, shorter: every method ran, and the teacher's answers on mixtures are worth most."
    monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)
    ns, cells = {}, json.loads(SCRATCH.read_text())['cells']
    for c in cells:
        if c['cell_type'] == 'code':
            exec(''.join(c['source']), ns)
        if 'parameters' in c['metadata'].get('tags', []):
            ns |= dict(seeds=1, steps=200)
    plt.close('all')
    assert list(ns['found']) == ['ERM', 'MixUp', 'KD', 'XCL']
    scores = {k: v[0] for k, v in ns['found'].items()}
    assert ns['accuracy'](ns['teacher']) > 95 and scores['ERM'] > 70, scores
    assert scores['XCL'] > max(scores[k] for k in ('ERM', 'MixUp', 'KD')), scores
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    assert not [s for s in code if 'xcl' in s]


# ---- slips ----


def refused(nb, **params):
    "The message with which a notebook's own cells stop, in this process; nothing is trained by then."
    cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
    ns = {}
    with pytest.raises(Exception) as e:
        for c in cells:
            exec(''.join(c['source']), ns)
            if 'parameters' in c['metadata'].get('tags', []):
                ns |= params
    assert not list(Path(os.environ['XCL_HOME']).rglob('config.json')), 'it has begun to train'
    return f'{e.typename}: {e.value}'


@each
def test_an_unknown_parameter_is_refused_at_once(nb):
    said = refused(nb, preset='smoke', sed=1)
    assert re.search(r"ParameterError: unknown parameter 'sed'.*\bseed\b", said), said


SLIPS = {
    'a preset that does not exist': (dict(preset='papr'), r"preset is 'papr'.*smoke.*demo.*paper"),
    'a string for a number': (dict(preset='smoke', seed='x'), r"seed is 'x'.*allowed: int"),
    'a value out of range': (dict(preset='smoke', budget=7), r'budget is 7.*allowed: [\d.]+ to'),
}


@pytest.mark.parametrize('slip', SLIPS)
def test_slip_is_refused_at_once(slip):
    "One notebook stands for all: they share `xcl.paper.params` (tests/test_params.py)."
    params, message = SLIPS[slip]
    said = refused(ROOT / 'nbs' / 'resnet18.ipynb', **params)
    assert re.search(f'ParameterError: .*{message}', said), said


@pytest.mark.parametrize(
    'data_dir, message',
    [
        ('/nonexistent/MPIIGaze', '/nonexistent/MPIIGaze'),  # is not there
        ('', 'data_dir'),  # was not given
        ('{tmp}', '{tmp}'),  # holds something else
    ],
    ids=['missing', 'not given', 'holds something else'],
)
def test_gaze_names_a_folder_without_data(data_dir, message, tmp_path):
    (tmp_path / 'notes.txt').write_text('no eyes here')
    where = data_dir.format(tmp=tmp_path)
    said = refused(GAZE, preset='smoke', dataset='mpiigaze', data_dir=where)
    assert message.format(tmp=tmp_path) in said and re.search(r'Error: .{30}', said), said


def test_gaze_refuses_unlabelled_eyes_of_another_size(tmp_path):
    "The GAN's target domain is read before a teacher is trained."
    np.savez(tmp_path / 'eyes.npz', image=np.zeros((40, 9, 15), np.uint8))
    said = refused(GAZE, preset='smoke', unlabelled=str(tmp_path / 'eyes.npz'))
    assert re.search(r'Error: .*eyes\.npz.* \(40, 9, 15\).*36, 60', said), said
