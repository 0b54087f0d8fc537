"""Folders of runs: damaged files, a full or read-only disk, names, and the table of runs."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save

from xcl.files import home, read_json, read_tensors, write_json, write_tensors
from xcl.runs import Run, RunConfig, check_state, ensure, locked, main, run_status, slug_of
from xcl.runtime import RuntimeConfig, path_of, register_path


@dataclass(frozen=True)
class Walk(RunConfig):
    steps: int
    stop: int = -1  # raise KeyboardInterrupt after this many steps
    name: str = 'walk'

    @property
    def slug(self):
        return self.name

    def make(self, run):
        tensors, state = run.load_checkpoint() or (
            {'net.w': torch.zeros(4)},
            dict(step=0, curve=[]),
        )
        check_state(state, self.steps, tensors, ('net.',), run.checkpoint)
        while state['step'] < self.steps:
            tensors['net.w'] += 1
            state.update(step=state['step'] + 1, steps=self.steps)
            run.save_checkpoint(tensors, state)
            if state['step'] == self.stop and not os.environ.get('GO_ON'):
                raise KeyboardInterrupt
        run.finish(dict(steps=self.steps), state['curve'], weights=tensors)


@pytest.fixture
def halfway():
    "A run that was interrupted after 2 of 4 steps."
    with pytest.raises(KeyboardInterrupt):
        ensure(Walk(4, stop=2))
    return Run(Walk(4, stop=2))


@pytest.fixture
def go_on(monkeypatch):
    monkeypatch.setenv('GO_ON', '1')


# ---- one flipped bit, and other damage ----


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_a_checkpoint_is_found(halfway, go_on):
    flip(halfway.checkpoint, -1)
    with pytest.raises(ValueError, match='checkpoint.safetensors is damaged .the digest of its'):
        ensure(halfway.cfg)
    halfway.checkpoint.unlink()
    assert ensure(halfway.cfg).result == dict(steps=4)


@pytest.mark.parametrize('place', [-1, 12, 60])
def test_a_flipped_bit_in_weights_is_found(place):
    run = ensure(Walk(3))
    flip(run.folder / 'weights.safetensors', place)
    with pytest.raises(
        ValueError, match=r'weights.safetensors is damaged .*Remove \S+ to have the run'
    ):
        run.tensors()


def test_tensors_of_version_0_1_are_read(tmp_path):
    (tmp_path / 'old.safetensors').write_bytes(save(dict(w=torch.arange(3))))
    assert read_tensors(tmp_path / 'old.safetensors')['w'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('dtype', [torch.bool, torch.bfloat16, torch.int64, torch.float8_e5m2])
def test_tensors_of_each_type_and_shape_come_back(dtype, tmp_path):
    written = {'a': torch.zeros(2, 3).to(dtype), 'empty': torch.zeros(0, 2).to(dtype)}
    written['one'] = torch.ones(()).to(dtype)
    write_tensors(tmp_path / 'f', written)
    back = read_tensors(tmp_path / 'f')
    assert {k: (v.dtype, v.shape) for k, v in back.items()} == {
        k: (v.dtype, v.shape) for k, v in written.items()
    }
    assert float(back['one']) == 1


def test_equal_tensors_are_equal_files(tmp_path):
    named = dict(a=torch.rand(3), b=torch.rand(2, 2).T)
    for name in 'one', 'two':
        write_tensors(tmp_path / name, named if name == 'one' else dict(reversed(named.items())))
    assert (tmp_path / 'one').read_bytes() == (tmp_path / 'two').read_bytes()


CHECKPOINTS = {
    'no state': (dict(w=torch.ones(1)), 'no state in it'),
    'state of no keys': (dict(_state=torch.tensor(list(b'{}'), dtype=torch.uint8)), 'lacks cpu_s'),
    'a list': (dict(_state=torch.tensor(list(b'[]'), dtype=torch.uint8)), 'lacks cpu_s'),
    'no JSON': (dict(_state=torch.tensor([255, 0], dtype=torch.uint8)), 'no state in it'),
}


@pytest.mark.parametrize('tensors, message', CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_other_code_is_refused(tensors, message, halfway, go_on):
    write_tensors(halfway.checkpoint, tensors)
    with pytest.raises(
        ValueError, match=f'checkpoint.safetensors is damaged .*{message}.*Remove it'
    ):
        ensure(halfway.cfg)


@pytest.mark.parametrize('step', [-1, 5, 2.0, None, True, '2'])
def test_a_step_outside_the_run_is_refused(step, halfway, go_on):
    tensors, state = halfway.load_checkpoint()
    halfway.save_checkpoint(tensors, state | dict(step=step))
    with pytest.raises(ValueError, match=f'step is {step!r}; allowed: 0 to 4.*Remove it to start'):
        ensure(halfway.cfg)


@pytest.mark.parametrize('name', ['opt.0.exp_avg', 'optimum', 'net.opt.'])
def test_a_checkpoint_without_optimiser_is_refused(name):
    tensors, state = {'net.w': torch.ones(1), name: torch.ones(1)}, dict(step=1, curve=[])
    if name.startswith('opt.'):
        return check_state(state, 2, tensors)
    with pytest.raises(ValueError, match=r'no tensor is called opt\.\*; allowed: net\.\*, opt\.\*'):
        check_state(state, 2, tensors)


JSONS = {
    'result': ([b'', b'[]', b'{"top1": NaN}', b'\xff\xfe{}'], 'result'),
    'curve': ([b'{}', b'[1,', b'null'], 'curve'),
    'provenance': ([b'"x"', b'{'], 'provenance'),
    'config': ([b'{}', b'{"kind": 3}', b'[]'], 'config'),
}
CASES = [(name, text) for name, (texts, _) in JSONS.items() for text in texts]


@pytest.mark.parametrize('name, text', CASES)
def test_damaged_json_is_named(name, text):
    run = ensure(Walk(1))
    (run.folder / f'{name}.json').write_bytes(text)
    with pytest.raises(
        ValueError, match=rf'{name}.json is damaged .*expected .*Remove \S+ to have'
    ):
        getattr(run, name)


def test_read_json_names_what_it_found(tmp_path):
    write_json(tmp_path / 'a.json', dict(pid=True, files=[]))
    with pytest.raises(ValueError, match=r'pid is True\); expected an object with pid \(str\)'):
        read_json(tmp_path / 'a.json', dict(pid=str))
    with pytest.raises(FileNotFoundError, match='b.json'):
        read_json(tmp_path / 'b.json')


# ---- disks ----


def test_a_full_disk_names_the_file_and_keeps_the_checkpoint(halfway, monkeypatch):
    before = halfway.checkpoint.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='the disk is full: [0-9,]+ bytes .*Free some space') as e:
        halfway.save_checkpoint({'net.w': torch.ones(99)}, dict(step=3, curve=[]))
    assert e.value.filename == str(halfway.checkpoint) and e.value.errno == errno.ENOSPC
    assert halfway.checkpoint.read_bytes() == before
    assert not [*halfway.folder.glob('.*.tmp')]


def test_another_error_of_the_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    def broken(a, b):
        raise OSError(errno.EIO, 'input/output error')

    monkeypatch.setattr(os, 'replace', broken)
    with pytest.raises(OSError, match='input/output error'):
        write_json(tmp_path / 'x.json', 1)
    assert not [*tmp_path.iterdir()]


def test_a_finished_run_is_found_on_a_read_only_disk(monkeypatch):
    cfg = Walk(2)
    path = ensure(cfg).checkpoint
    path.write_bytes(b'left by a process that was killed')

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for where, name in (Path, 'unlink'), (Path, 'mkdir'), (os, 'replace'), (FileLock, 'acquire'):
        monkeypatch.setattr(where, name, refuse)
    assert ensure(cfg).result == dict(steps=2)
    assert run_status().state.tolist() == ['finished']


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
def test_no_file_stays_mapped_after_it_was_read(halfway):
    tensors, _ = halfway.load_checkpoint()
    weights = read_tensors(halfway.checkpoint)
    assert str(halfway.folder) not in Path('/proc/self/maps').read_text()
    halfway.checkpoint.write_bytes(b'')  # cut short: a mapped file would end the process
    assert tensors['net.w'].tolist() == weights['net.w'].tolist() == [2.0] * 4


@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": "x"}', '{"host": "a"}', '\0'])
def test_a_damaged_holder_file_does_not_stop_the_waiting_process(text, capsys, monkeypatch):
    run = Run(Walk(1))
    run.folder.mkdir(parents=True)
    (run.folder / 'holder.json').write_text(text)
    held = FileLock(run.folder / 'lock')
    held.acquire()
    real = FileLock.acquire

    def acquire(self, timeout=None, **kw):
        if timeout is None:
            held.release()  # as soon as the other process waits
        return real(self, timeout=timeout, **kw)

    monkeypatch.setattr(FileLock, 'acquire', acquire)
    with locked(run):
        pass
    assert 'another process is working on this run; waiting for it' in capsys.readouterr().out


# ---- names ----


def test_the_home_folder_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv('XCL_HOME', '~/some runs')
    assert home() == Path.home() / 'some runs'


@pytest.mark.parametrize('name', ['w' * 500, 'ü' * 300, '../' * 90 + 'x', 'A b_c' * 60, '.', ''])
def test_a_folder_name_has_at_most_120_characters_and_stays_in_its_home(name):
    a, b = Run(Walk(1, name=name)), Run(Walk(2, name=name))
    assert len(a.folder.name.encode()) <= 120 and a.folder.parent == home()
    assert a.folder.name.endswith(a.cfg.hash) and a.folder != b.folder
    assert a.folder.name[0] not in './'


def test_a_long_slug_keeps_its_head():
    words = 'ResNet-18', 'XCL-Mix', *range(90)
    assert slug_of(*words).startswith('resnet-18-xcl-mix-0-1-2') and len(slug_of(*words)) <= 107
    assert slug_of(slug_of(*words)) == slug_of(*words)


# ---- the table of runs ----


def test_the_table_says_how_far_each_run_is(halfway):
    done, begun = ensure(Walk(3)), Run(Walk(9))
    begun.folder.mkdir()
    write_json(begun.folder / 'config.json', begun.cfg.to_dict())
    table = run_status().set_index('name')
    rows = [table.loc[r.folder.name] for r in (done, halfway, begun)]
    assert [r.state for r in rows] == ['finished', 'interrupted', 'waiting']
    assert [r.step for r in rows] == [3, 2, 0]
    assert [r.percent for r in rows][:2] == [100, 50]
    assert all(r.age_s >= 0 for r in rows) and rows[1].cpu_s >= 0
    with locked(halfway):
        state = run_status().set_index('name').state[halfway.folder.name]
    assert state.startswith(f'running: process {os.getpid()} on ')


def test_a_damaged_run_does_not_hide_the_others(halfway):
    bad = [ensure(Walk(k)) for k in (5, 6)]
    (bad[0].folder / 'result.json').write_text('')
    (bad[1].folder / 'result.json').unlink()
    bad[1].checkpoint.write_bytes(b'\xff' * 40)
    states = run_status().set_index('name').state
    assert [states[r.folder.name] for r in (*bad, halfway)] == ['damaged', 'damaged', 'interrupted']


def test_the_command_prints_a_table_and_json(halfway):
    line = [sys.executable, '-X', 'importtime', '-m', 'xcl.runs']
    done = subprocess.run([*line, '--json'], capture_output=True, text=True, check=True)
    [row] = json.loads(done.stdout)
    assert (row['state'], row['step'], row['steps']) == ('interrupted', 2, 4)
    assert not [o for o in ('torchvision', 'matplotlib', 'xcl.train') if f' {o}\n' in done.stderr]


def test_the_command_without_runs(capsys):
    main([])
    assert capsys.readouterr().out == f'no runs in {home()}\n'
    main(['--json'])
    assert json.loads(capsys.readouterr().out) == []


# ---- the machine ----


BAD = [
    (dict(checkpoint_s=float('nan')), ValueError),
    (dict(checkpoint_s=float('inf')), ValueError),
    (dict(checkpoint_s=0), ValueError),
    (dict(checkpoint_s=-3.0), ValueError),
    (dict(checkpoint_s='30'), TypeError),
    (dict(workers=-2), ValueError),
    (dict(workers=True), TypeError),
    (dict(world_size=0), ValueError),
    (dict(world_size=2.0), TypeError),
    (dict(target_cache=1), TypeError),
    (dict(device=0), TypeError),
]


@pytest.mark.parametrize('wrong, error', BAD, ids=str)
def test_runtime_refuses_values_out_of_range(wrong, error):
    [(name, value)] = wrong.items()
    with pytest.raises(error, match=f'{name} is .*allowed'):
        RuntimeConfig(**(dict(device='cpu') | wrong))


def test_a_path_is_found_by_digest(tmp_path):
    register_path('d1', tmp_path / 'a')
    with pytest.raises(FileNotFoundError, match=r'photos with digest d1: \S+a does not exist'):
        path_of('d1', 'photos')
    (tmp_path / 'a').mkdir()
    assert path_of('d1', 'photos') == tmp_path / 'a'
    with pytest.raises(FileNotFoundError, match='--path d2=PATH'):
        path_of('d2', 'photos')
