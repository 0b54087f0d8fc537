"""What a user's run leaves of the checkout, and what `make publish` writes.

Publishing is tried on the notebook that collects what others trained, as it takes seconds."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from xcl.paper import publish as publishing
from xcl.paper.publish import given_params, publish
from xcl.paper.show import LONGEST_NAME

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = sorted(path.parent for path in (ROOT / 'outputs').glob('*/*/params.yaml'))
PUBLISHED = [path for path in PUBLISHED if path.parent.name != 'runs']


def make(*words, **env):
    "What `make -n` would run."
    venv = Path(sys.prefix)
    done = subprocess.run(
        ['make', '-n', *words, f'VENV={venv}'], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_ignored(path):
    "Whether git ignores a path of the checkout."
    words = ['git', 'check-ignore', '-q', path]
    return subprocess.run(words, cwd=ROOT).returncode == 0


@pytest.mark.parametrize('words', [('gaze',), ('resnet18', 'PRESET=paper', 'SEED=2')])
def test_make_writes_where_git_does_not_look(words):
    "Into outputs/runs; reports go below $XCL_HOME, which is outputs/runs by default."
    said = make(*words, PATH='/usr/bin:/bin')
    assert '${XCL_HOME:-outputs/runs}/notebooks/' in said
    assert is_ignored('outputs/runs/notebooks/gaze-demo-seed1.ipynb')
    assert is_ignored('outputs/runs/reports/gaze/demo-0c07a4/runs.csv')
    places = [line for line in said.splitlines() if 'papermill' in line and 'outputs/' in line]
    assert all('outputs/runs' in line for line in places)


def test_make_takes_a_setting():
    said = make('resnet18', 'SETTING=few_images', PATH='/usr/bin:/bin')
    assert '-f nbs/settings/few_images.yaml -p setting few_images' in said
    assert '-p preset' not in said, 'the file says which'


def test_publish_runs_the_notebook_and_keeps_one_folder(tmp_path):
    "Twice into one folder: the second replaces the first, and other parameters are refused."
    folder = publish('few_images', 'smoke', outputs=tmp_path)
    (folder / 'no-longer-drawn.png').touch()
    first = {path.name for path in folder.iterdir()}
    again = publish('few_images', 'smoke', outputs=tmp_path)
    second = {path.name for path in again.iterdir()}
    assert again == folder and first - second == {'no-longer-drawn.png'}
    assert {'notebook.ipynb', 'params.yaml'} < second and {'.png', '.csv'} <= {
        Path(name).suffix for name in second
    }
    page = nbformat.read(folder / 'notebook.ipynb', as_version=4)
    nbformat.validate(page)
    text = (folder / 'notebook.ipynb').read_text()
    assert str(ROOT) not in text and 'start_time' not in text, 'it names a place or a time'
    assert page.metadata.papermill.parameters == {'preset': 'smoke', 'setting': 'smoke'}
    assert all(cell.get('execution_count') for cell in page.cells if cell.cell_type == 'code')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match='other parameters .*seed: 1 there, 2 now') as e:
        publish('few_images', 'smoke', dict(seed=2), tmp_path)
    assert str(folder) in str(e.value), 'it names the published folder'
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_notebook_without_reports_is_published_with_its_parameters(tmp_path):
    "from_scratch is plain PyTorch."
    folder = publish('from_scratch', 'smoke', dict(steps=2, seeds=1), tmp_path)
    assert yaml.safe_load((folder / 'params.yaml').read_text()) == dict(
        seed=1, seeds=1, images=50, steps=2, data=''
    )
    with pytest.raises(FileExistsError, match='steps: 2 there, 3 now'):
        publish('from_scratch', 'smoke', dict(steps=3, seeds=1), tmp_path)


def test_a_failing_notebook_leaves_the_published_folder(tmp_path, monkeypatch):
    folder = tmp_path / 'few_images' / 'smoke'
    folder.mkdir(parents=True)
    (folder / 'params.yaml').write_text('seed: [')
    with pytest.raises(Exception, match='params.yaml is damaged'):
        publish('few_images', 'smoke', outputs=tmp_path)
    assert [path.name for path in folder.iterdir()] == ['params.yaml']


def test_files_that_are_no_settings_are_refused():
    "few_images.yaml describes a campaign."
    with pytest.raises(ValueError, match='few_images gives .*question.*does not have'):
        given_params('resnet18', 'few_images')


def test_the_command_says_what_is_allowed():
    words = [sys.executable, '-m', publishing.__name__, 'gaze', 'demo', '-p', 'sed', '1']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'sed, which gaze does not have' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('folder', PUBLISHED, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_published_folders_have_short_names(folder):
    names = [path.name for path in folder.rglob('*')]
    assert not [name for name in names if len(name) > LONGEST_NAME + 4], 'publish it again'
    for path in folder.glob('*.csv'):
        assert not path.read_text().startswith('#'), f'{path.name} begins with a caption'
