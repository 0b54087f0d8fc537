"""Experiment notebooks as a user runs them: under papermill, at `preset smoke`, with seeds that are not the
default, and with slips.

Outputs of a smoke run go below XCL_HOME, so nothing here writes into the checkout."""

import base64
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(
    o for o in (ROOT / 'nbs').glob('*.ipynb') if not re.match(r'\d\d[a-z]?_', o.name)
)
COLLECTING = {'tables'}  # experiments that train nothing, but collect what others have trained
TIMEOUT = 300  # seconds for one cell

each = pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda o: o.stem)


@pytest.fixture(scope='module', autouse=True)
def this_environment(session_home):
    """Programs and kernel of the environment that runs pytest, whatever else is on PATH and whichever
    `python3` kernel the user keeps."""
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('PATH', os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
        mp.setenv('JUPYTER_PATH', str(Path(sys.prefix) / 'share' / 'jupyter'))
        mp.setenv('OMP_NUM_THREADS', '1')  # two notebooks run side by side
        yield


def outputs_of_checkout():
    "What lies in outputs/, ignored or not, and when it was written."
    return {
        p: p.stat().st_mtime_ns
        for p in (ROOT / 'outputs').rglob('*')
        if p.is_file() and 'runs' not in p.relative_to(ROOT).parts
    }


def records(home):
    "Curves and results below `home`, as bytes."
    return {
        p.relative_to(home).as_posix(): p.read_bytes()
        for p in home.rglob('*.json')
        if p.name in ('curve.json', 'result.json')
    }


def tables(home):
    "Tables below `home`, as bytes."
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in home.rglob('*.csv')}


def papermill_command(words, home, cwd):
    "A command line, run by a shell in `cwd`."
    done = subprocess.run(
        words,
        shell=True,
        cwd=cwd,
        env={**os.environ, 'XCL_HOME': str(home)},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module', params=EXPERIMENTS, ids=lambda o: o.stem)
def smoke(request, tmp_path_factory):
    "An experiment, executed twice with seed 7 in fresh homes, side by side."
    nb, tmp, trains = (
        request.param,
        tmp_path_factory.mktemp(request.param.stem),
        request.param.stem not in COLLECTING,
    )
    git = subprocess.run(
        ['git', 'status', '--porcelain', '--', 'outputs'], cwd=ROOT, capture_output=True, text=True
    ).stdout
    before = outputs_of_checkout()

    def execute(k):
        params = (
            '-p preset smoke -p seed 7' + ' -p device cpu' * trains
        )  # equal bits are promised on a CPU
        papermill_command(
            f'{sys.executable} -m papermill {nb} {k}.ipynb {params} --no-progress-bar --execution-timeout {TIMEOUT}',
            tmp / k,
            tmp,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, ('a', 'b')))
    cells = [
        c for c in json.loads((tmp / 'a.ipynb').read_text())['cells'] if c['cell_type'] == 'code'
    ]
    after = subprocess.run(
        ['git', 'status', '--porcelain', '--', 'outputs'], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return SimpleNamespace(
        trains=trains,
        homes=(tmp / 'a', tmp / 'b'),
        cells=cells,
        outputs=[o for c in cells for o in c['outputs']],
        git=(git, after),
        files=(before, outputs_of_checkout()),
    )


def texts(outputs):
    "All that an executed notebook says, images left out."
    said = [o.get('text', '') for o in outputs] + [
        o.get('data', {}).get(k, '') for o in outputs for k in ('text/plain', 'text/html')
    ]
    return '\n'.join(''.join(t) for t in said)


def test_every_cell_ran(smoke):
    assert all(c['execution_count'] for c in smoke.cells if ''.join(c['source']).strip())


def test_the_seed_arrives(smoke):
    """In what the notebook says, and in the configs of all that was trained: seeds 7, 8, ... and teachers
    7001, 7002, ..., 8001, ..."""
    assert re.search(r'\bseed 7\b', texts(smoke.outputs))
    configs = [json.loads(p.read_text()) for p in smoke.homes[0].glob('*/config.json')]
    assert bool(configs) == smoke.trains, (
        'something was trained' if configs else 'nothing was trained'
    )
    if not smoke.trains:
        return
    seeds = {
        o['seed'] for c in configs for o in (c, *c.get('teachers', ())) if 'seed' in o
    }  # answers to a set have none
    assert 7 in seeds and {s if s < 1000 else s // 1000 for s in seeds} <= {7, 8, 9}, seeds
    splits = {
        c['data']['split'] for c in configs if c.get('data', {}).get('kind') == 'EyeData'
    }  # a seed draws people, not the images of a set
    assert splits <= {7, 8, 9}, splits


def test_there_are_figures_and_tables(smoke):
    data = [o.get('data', {}) for o in smoke.outputs]
    assert [d for d in data if base64.b64decode(d.get('image/png', ''))[:4] == b'\x89PNG'], (
        'no figure'
    )
    assert [d for d in data if '<table' in ''.join(d.get('text/html', ''))], 'no table'
    assert 'SMOKE - not a result' in texts(smoke.outputs), (
        'captions of a smoke run are to say that it is none'
    )


def test_it_is_quiet(smoke):
    assert not [o for o in smoke.outputs if o['output_type'] == 'error']
    assert not re.search(
        r'\d+%\||\d(it|step|s|person)/(s|it|step|person)\b', texts(smoke.outputs)
    ), 'a progress bar where nobody looks'
    stderr = ''.join(''.join(o['text']) for o in smoke.outputs if o.get('name') == 'stderr')
    assert not stderr, stderr[:2000]


def test_the_same_seed_gives_the_same_records(smoke):
    a, b = map(records if smoke.trains else tables, smoke.homes)
    assert len(a) >= 2 and sorted(a) == sorted(b)
    assert not [k for k in a if a[k] != b[k]], 'not the same bytes'


def test_outputs_go_below_home(smoke):
    assert smoke.git[0] == smoke.git[1] and smoke.files[0] == smoke.files[1], (
        'a smoke run wrote into outputs/'
    )
    assert {'.csv', '.png'} <= {p.suffix for p in smoke.homes[0].rglob('*')}, (
        'tables and figures are written to files, too'
    )


@pytest.mark.skipif(not (ROOT / 'nbs' / 'gaze.ipynb').exists(), reason='there is no nbs/gaze.ipynb')
def test_the_command_of_the_readme(tmp_path):
    "Literally, in a folder that sees the checkout's nbs/."
    (tmp_path / 'nbs').symlink_to(ROOT / 'nbs')
    papermill_command(
        'papermill nbs/gaze.ipynb out.ipynb -p seed 3 -p preset smoke', tmp_path / 'home', tmp_path
    )
    said = json.loads((tmp_path / 'out.ipynb').read_text())
    assert (
        said['metadata']['papermill']['parameters'] == {'seed': 3, 'preset': 'smoke'}
        and not said['metadata']['papermill']['exception']
    )
    assert '-seed3-' in ' '.join(p.parent.name for p in (tmp_path / 'home').glob('*/result.json'))


# ---- slips ----


def refused(nb, tmp_path, **params):
    "The message with which a notebook stops; it has trained nothing by then."
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(
            nb,
            tmp_path / 'out.ipynb',
            params,
            kernel_name='python3',
            progress_bar=False,
            execution_timeout=TIMEOUT,
            cwd=tmp_path,
        )
    home = Path(os.environ['XCL_HOME'])
    assert not list(home.rglob('config.json')), 'it has begun to train'
    return f'{e.value.ename}: {e.value.evalue}'


SLIPS = {
    'a name that it does not have': (dict(sed=1), r"unknown parameter 'sed'; allowed: .*\bseed\b"),
    'a preset that does not exist': (
        dict(preset='papr'),
        r"preset is 'papr'; allowed: .*smoke.*demo.*paper",
    ),
    'a string for a number': (dict(seed='x'), r"seed is 'x' .*allowed: int"),
    'a value out of range': (dict(budget=7), r'budget is 7.*allowed: [\d.]+ to [\d.]+'),
}


@each
@pytest.mark.parametrize('slip', SLIPS)
def test_slip_is_refused_at_once(nb, slip, tmp_path):
    params, message = SLIPS[slip]
    if nb.stem in COLLECTING and 'budget' in params:
        message = r"unknown parameter 'budget'; allowed: .*\bruns_dir\b"
    assert re.search(
        f'ParameterError: .*{message}', refused(nb, tmp_path, **{'preset': 'smoke', **params})
    )


# ---- tables of what has been trained ----


def collected(tmp_path, runs_dir):
    """The cells of Tables 2 to 5 that nbs/tables.ipynb makes of a folder: name -> (top-1, measured at); and
    what it says."""
    done = papermill.execute_notebook(
        ROOT / 'nbs' / 'tables.ipynb',
        tmp_path / 'out.ipynb',
        dict(preset='smoke', runs_dir=str(runs_dir)),
        kernel_name='python3',
        progress_bar=False,
        execution_timeout=TIMEOUT,
        cwd=tmp_path,
    )
    frames = [
        pandas.read_csv(p, comment='#', index_col=0)
        for p in sorted(Path(os.environ['XCL_HOME']).rglob('*-table[2345].csv'))
    ]
    assert [f.index.name for f in frames] == [f'table {k}' for k in (2, 3, 4, 5)]
    cells = {
        (f.index.name, name): (row['top-1 (%)'], row['measured at'])
        for f in frames
        for name, row in f.iterrows()
    }
    return cells, texts([o for c in done.cells if c.cell_type == 'code' for o in c.outputs])


def test_tables_of_nothing(tmp_path):
    "An empty folder: every cell says that it has not been measured, and none of ours has a number."
    (tmp_path / 'nothing').mkdir()
    cells, said = collected(tmp_path, tmp_path / 'nothing')
    assert len(cells) == 19 and set(cells.values()) == {('-', 'not yet measured')}
    assert (
        '0 runs in 0 settings' in said
        and '0 at the full recipe, 0 at less, 19 not yet measured' in said
    )


def test_tables_of_two_records(tmp_path):
    "Two seeds of one row of Table 3, at a twentieth of the recipe, fill one cell, which says so."
    from xcl.images import ImageData
    from xcl.train import image_run

    data, shapes = ImageData('cifar100', 100, train_size=10_000), dict(resnet18=(('width', 16),))
    configs = [image_run('LS 0.1', data, seed, 0.05, shapes) for seed in (1, 2)]
    runs = [
        dict(
            run=c.slug,
            hash=c.hash,
            result=dict(top1=48.0 + 2 * c.seed, target_entropy=0.17),
            config=c.to_dict(),
            provenance=dict(commit='abc', dirty=False),
        )
        for c in configs
    ]
    (tmp_path / 'reports').mkdir()
    (tmp_path / 'reports' / 'toy-records.json').write_text(json.dumps(dict(records=[], runs=runs)))
    cells, said = collected(tmp_path, tmp_path / 'reports')
    assert cells.pop(('table 3', 'LS 0.1')) == (
        '51.00 ± 1.41 (2)',
        'budget 0.05, width 16, 10,000 images',
    )
    assert set(cells.values()) == {('-', 'not yet measured')}
    assert (
        '2 runs in 1 settings' in said
        and '0 at the full recipe, 1 at less, 18 not yet measured' in said
    )


def test_tables_names_a_folder_that_is_not_there(tmp_path):
    said = refused(
        ROOT / 'nbs' / 'tables.ipynb', tmp_path, preset='smoke', runs_dir=str(tmp_path / 'nowhere')
    )
    assert re.search(
        f'ParameterError: runs_dir is .*{tmp_path}/nowhere.*allowed: a folder that exists', said
    )


GAZE = [o for o in EXPERIMENTS if o.stem == 'gaze']


@pytest.mark.parametrize('nb', GAZE, ids=lambda o: o.stem)
@pytest.mark.parametrize(
    'data_dir, message',
    [
        ('/nonexistent/MPIIGaze', '/nonexistent/MPIIGaze'),  # is not there
        ('', 'data_dir'),  # was not given
        ('{tmp}', '{tmp}'),  # holds something else
    ],
    ids=['missing', 'not given', 'holds something else'],
)
def test_gaze_names_a_folder_without_data(nb, data_dir, message, tmp_path):
    (tmp_path / 'notes.txt').write_text('no eyes here')
    said = refused(
        nb, tmp_path, preset='smoke', dataset='mpiigaze', data_dir=data_dir.format(tmp=tmp_path)
    )
    assert message.format(tmp=tmp_path) in said and re.search(r'Error: .{30}', said), said


@pytest.mark.parametrize('nb', GAZE, ids=lambda o: o.stem)
def test_gaze_refuses_unlabelled_eyes_of_another_size(nb, tmp_path):
    "The GAN's target domain is looked at before a teacher is trained."
    np.savez(tmp_path / 'eyes.npz', image=np.zeros((40, 9, 15), np.uint8))
    said = refused(nb, tmp_path, preset='smoke', unlabelled=str(tmp_path / 'eyes.npz'))
    assert re.search(
        r'ValueError: .*eyes\.npz: image is uint8 \(40, 9, 15\); expected uint8 \(n, 36, 60\)', said
    ), said
