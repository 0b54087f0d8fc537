"""Plans: what runs code, what is refused, where files are found.

Processes that die are in test_processes.py.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from xcl import source
from xcl.launch import main, work
from xcl.plan import command, read_plan, write_plan
from xcl.runs import Run
from xcl.runtime import RuntimeConfig, path_of, register_path

MODULE = """
import os
from dataclasses import dataclass
from pathlib import Path
from xcl.runs import RunConfig
from xcl.source import import_named

Path(os.environ['MARK']).touch()

def twice(n):
    return 2 * n

@dataclass(frozen=True)
class Sum(RunConfig):
    upto: int
    by: str = ''

    def make(self, run):
        n = sum(range(self.upto))
        run.finish(dict(n=import_named(self.by)(n) if self.by else n), [])
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A module `sums` of one's own, on the path; `mark` exists once it was imported."
    (tmp_path / 'sums.py').write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    monkeypatch.setenv('MARK', str(tmp_path / 'mark'))
    monkeypatch.setattr(source, '_ALLOWED', [])
    import sums

    yield sums
    sys.modules.pop('sums', None)


@pytest.fixture
def launched(lab, tmp_path):
    "A function (configs, words) -> output and exit code of a process that has not imported `sums`."

    def launch(configs, *words):
        write_plan(tmp_path / 'plan.json', configs)
        (tmp_path / 'mark').unlink(missing_ok=True)
        line = [sys.executable, '-m', 'xcl.launch', str(tmp_path / 'plan.json'), *words]
        done = subprocess.run(line, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode

    return launch


def test_a_plan_runs_no_code_that_the_command_line_does_not_name(lab, launched, tmp_path):
    output, code = launched([lab.Sum(5)])
    assert code == 1 and 'add: --allow sums' in output and 'Traceback' not in output, output
    assert not (tmp_path / 'mark').exists() and not Run(lab.Sum(5)).done


def test_a_module_that_the_command_line_names_runs(lab, launched):
    output, code = launched([lab.Sum(5), lab.Sum(5, by='sums:twice')], '--allow', 'sums')
    assert code == 0 and '2/2' in output, output
    assert (Run(lab.Sum(5)).result, Run(lab.Sum(5, 'sums:twice')).result) == (
        dict(n=10),
        dict(n=20),
    )


@pytest.mark.parametrize('by', ['os:getpid', 'sums:os.getpid', 'sums:Path', 'sums:nothing'])
def test_a_name_that_leads_out_of_the_allowed_modules_is_refused(by, lab, tmp_path):
    write_plan(tmp_path / 'plan.json', [lab.Sum(5, by=by)])
    with pytest.raises((SystemExit, ValueError), match='--allow|has no'):
        main([str(tmp_path / 'plan.json'), '--allow', 'sums'])
    assert not Run(lab.Sum(5, by=by)).done


def test_an_edited_class_is_said(lab, launched, tmp_path):
    output, code = launched([lab.Sum(5)], '--allow', 'sums')
    (tmp_path / 'sums.py').write_text(MODULE.replace('range(self.upto)', 'range(self.upto + 1)'))
    line = [sys.executable, '-m', 'xcl.launch', str(tmp_path / 'plan.json'), '--allow', 'sums']
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and 'Sum has the source' in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr


def test_the_command_names_the_modules(lab, tmp_path):
    write_plan(tmp_path / 'plan.json', [lab.Sum(5)])
    assert command(tmp_path / 'plan.json', RuntimeConfig('cpu')).endswith('--allow sums')
    assert read_plan(tmp_path / 'plan.json', ('sums',)) == [lab.Sum(5)]


# ---- files by digest ----


def test_a_plan_carries_paths_and_the_command_line_overrides_them(lab, tmp_path):
    register_path('digest-a', tmp_path)
    register_path('digest-b', tmp_path)
    cfg = lab.Sum(3, by='digest-a')
    write_plan(tmp_path / 'plan.json', [cfg])
    assert json.loads((tmp_path / 'plan.json').read_text())['paths'] == {'digest-a': str(tmp_path)}
    register_path('digest-a', '/nowhere')
    read_plan(tmp_path / 'plan.json', ('sums',))
    assert path_of('digest-a', 'photos') == tmp_path
    other = tmp_path / 'other=place'
    other.mkdir()
    words = '--allow', 'sums', '--path', f'digest-a={other}'
    with pytest.raises(ValueError, match='names no code'):  # `by` is a digest here
        main([str(tmp_path / 'plan.json'), *words])
    assert path_of('digest-a', 'photos') == other


@pytest.mark.parametrize('text', ['digest', '=path', 'digest=', ''])
def test_a_path_without_digest_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(['plan.json', '--path', text])
    assert 'allowed: DIGEST=PATH' in capsys.readouterr().err


# ---- damaged plans ----


PLANS = {
    'nothing': (b'', 'is damaged'),
    'cut short': (b'{"format": "xcl pl', 'is damaged'),
    'UTF-16': ('{"format": "xcl plan 2"}'.encode('utf-16')[:-1], 'is damaged'),
    'a list': (b'[]', 'is no plan: format is None'),
    'version 1': (b'{"format": "xcl plan 1", "runs": []}', "format is 'xcl plan 1'; allowed"),
    'no runs': (b'{"format": "xcl plan 2", "paths": {}, "modules": []}', 'it lacks runs'),
    'runs of text': (
        b'{"format": "xcl plan 2", "paths": {}, "modules": [], "runs": ["a"]}',
        "run 0 is 'a'; allowed: run, hash, config",
    ),
    'no kind': (
        b'{"format": "xcl plan 2", "paths": {}, "modules": [],'
        b'"runs": [{"run": "a", "hash": "b", "config": {"n": 1}}]}',
        'the config of run 0 has no kind',
    ),
}


@pytest.mark.parametrize('content, message', PLANS.values(), ids=PLANS)
def test_a_damaged_plan_is_named(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(source, '_ALLOWED', [])
    path = tmp_path / 'my plan.json'
    path.write_bytes(content)
    with pytest.raises(SystemExit, match='my plan.json') as e:
        main([str(path)])
    assert message in str(e.value) and 'Execute the notebook that wrote it again' in str(e.value)


def test_a_plan_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(source, '_ALLOWED', [])
    with pytest.raises(SystemExit, match='absent.json'):
        main([str(tmp_path / 'absent.json')])


# ---- SIGTERM ----


def test_sigterm_ends_with_advice_and_a_second_one_does_not_hide_it(lab, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(lab.Sum, 'make', lambda self, run: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(
            SystemExit, match='was told to stop while it worked on sum.*Start the same'
        ):
            work([lab.Sum(4)], RuntimeConfig('cpu'))
        os.kill(os.getpid(), signal.SIGTERM)  # ignored: the message is still to be printed
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ordinary_error_restores_the_handler(lab, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def fail(self, run):
        raise RuntimeError('no room')

    monkeypatch.setattr(lab.Sum, 'make', fail)
    with pytest.raises(RuntimeError, match='no room'):
        work([lab.Sum(4)], RuntimeConfig('cpu'))
    assert signal.getsignal(signal.SIGTERM) == before
