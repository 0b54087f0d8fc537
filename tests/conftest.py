"""What every test here stands on.

Each test gets an XCL_HOME of its own, and so does whatever a fixture trains for a whole module: the user's
runs are neither read nor written. Threads: the models are tiny, and beyond four threads they only get slower;
programs that a test starts inherit the bound."""

import os
from pathlib import Path

import pytest

os.environ.setdefault(
    'OMP_NUM_THREADS', str(min(4, os.cpu_count() or 1))
)  # before anything imports torch
os.environ.setdefault('MPLBACKEND', 'Agg')

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests marked slow')


def group(item):
    "Tests of one file run in one process, those of an experiment notebook in one process for each notebook."
    name = Path(item.fspath).stem
    notebook = getattr(item, 'callspec', None) and item.callspec.params.get('smoke')
    return f'{name} {notebook.stem}' if notebook else name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    "Group tests for xdist; skip what needs a GPU that is not there, or --slow."
    for o in items:
        if not o.get_closest_marker('xdist_group'):
            o.add_marker(pytest.mark.xdist_group(group(o)))
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
