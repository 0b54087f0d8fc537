"""What every test here stands on.

Each test gets an XCL_HOME of its own, and so does whatever a fixture trains for a whole module: the user's
runs are neither read nor written. Threads: the models are tiny, and beyond four threads they only get slower;
programs that a test starts inherit the bound."""

import gc
import importlib
import os
import re
import sys
from pathlib import Path

import pytest

gc.disable()  # while modules are imported; see `pytest_collection_finish`
os.environ.setdefault(
    'OMP_NUM_THREADS', str(min(4, os.cpu_count() or 1))
)  # before anything imports torch
os.environ.setdefault('MPLBACKEND', 'Agg')

ROOT = Path(__file__).resolve().parent.parent
# programs that a test starts find the modules of this folder
PLACES = str(ROOT / 'tests'), os.environ.get('PYTHONPATH')
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, PLACES))
# 40 s and more on two cores, the longest first
LONGEST = [
    'test_runs',
    'test_grid',
    'test_gans',
    'test_generated',
    'test_slurm',
    'test_deploy',
    'test_device',
    'test_targets',
    'test_student_size',
    'test_processes',
    'test_publish',
    'test_notebooks',
    'test_soak',
    'test_committed',
    'test_imagenet',
    'test_config',
]


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests marked slow')


def group(nodeid):
    "The process of a test: one for each file, and in test_notebooks.py one for each notebook."
    path, _, test = nodeid.partition('::')
    notebook = re.search(r'\[([a-z0-9_]+)', test) if path.endswith('test_notebooks.py') else None
    return f'{path} {notebook[1]}' if notebook else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Fixtures of a module are made once, whatever the number of processes (`-n`)."
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    config.option.loadscopereorder = False  # `pytest_collection_modifyitems` orders them
    return ByGroup(config, log)


def by_length(item):
    "Where an item stands: the longest files first, so that none of them is left alone at the end."
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config, items):
    "Start with what takes long. Skip what needs a GPU that is not there, or --slow."
    items.sort(key=by_length)
    if not config.getoption('--slow'):
        for o in items:
            if o.get_closest_marker('slow'):
                o.add_marker(pytest.mark.skip(reason='slow; runs with --slow'))
    needs_gpu = [o for o in items if o.get_closest_marker('gpu')]
    if not needs_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for o in needs_gpu:
            o.add_marker(pytest.mark.skip(reason='no CUDA device'))


def pytest_collection_finish(session):
    "From here on the garbage collector looks at what tests make only, not at every imported module."
    gc.freeze()
    gc.enable()


@pytest.fixture(scope='session')
def root():
    "The checkout."
    return ROOT


@pytest.fixture(scope='session', autouse=True)
def session_home(tmp_path_factory):
    """XCL_HOME for fixtures that outlive one test; IN_TEST unset, since under it nbdev exports nothing and
    presets shrink."""
    with pytest.MonkeyPatch.context() as mp:
        home = tmp_path_factory.mktemp('xcl_home')
        mp.setenv('XCL_HOME', str(home))
        mp.delenv('IN_TEST', raising=False)
        yield home


@pytest.fixture(autouse=True)
def xcl_home(tmp_path, monkeypatch):
    "This test's own, empty XCL_HOME."
    home = tmp_path / 'xcl_home'
    monkeypatch.setenv('XCL_HOME', str(home))
    return home


@pytest.fixture
def place(tmp_path):
    "An empty home, and the log of its children."
    (tmp_path / 'home').mkdir()
    return tmp_path / 'home', tmp_path / 'log'


@pytest.fixture
def tosses(tmp_path, monkeypatch, xcl_home):
    "The module of runs that take no time, importable in other processes; its log is `tmp_path / 'log'`."
    monkeypatch.setenv('LOG', str(tmp_path / 'log'))
    sys.modules.pop('tosses', None)  # it reads $LOG when it is imported
    yield importlib.import_module('tosses')
    sys.modules.pop('tosses', None)
