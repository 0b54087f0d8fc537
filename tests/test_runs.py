"""Runs that are killed, asked for twice, damaged: each ends with the same bytes as a run that nobody
disturbed, or says what is wrong.

The processes here are real: see children.py."""

import ast
import itertools
import json
import os
import platform
import re
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from children import (
    assert_same,
    begun,
    checkpoints,
    folder,
    make,
    of,
    records,
    start,
    text,
    undisturbed,
    until,
)

from xcl.config import Config, rng
from xcl.gaze_data import EyeData
from xcl.likelihoods import Gaussian
from xcl.nets import net
from xcl.recipe import Recipe
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.train import METHODS, Train
from xcl.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / 'xcl').rglob('*.py'))
# 64 eyes to train on, 32 to validate
DATA = EyeData('procedural', split=1, people=3, held_out=1, per_person=32)
SMALL = Recipe('adam', 1e-3, 4, 3, (1.5,), weight_decay=1e-4)  # 48 steps


def teacher(seed=101, recipe=SMALL):
    return Train(net('preact_resnet'), Gaussian(), DATA, METHODS['MixUp'], recipe, seed)


def student(method='XCL-Mix', seed=1):
    return Train(
        net('lenet'),
        Gaussian(),
        DATA,
        METHODS[method],
        replace(SMALL, lr=1e-4),
        seed,
        teachers=(teacher(),),
    )


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Records of the student and its teacher, undisturbed."
    return undisturbed(tmp_path_factory, student())


# ---- the same bytes, whatever happens ----


def test_finished_folder_holds_records_and_nothing_else(reference):
    names = {Path(k).name for k in of(student(), reference)}
    assert names == {
        'config.json',
        'curve.json',
        'result.json',
        'weights.safetensors',
        'predictions.safetensors',
    }


def test_same_config_in_a_fresh_home_gives_the_same_bytes(reference, place):
    assert make(teacher(), *place) == 0
    assert_same(records(place[0]), of(teacher(), reference))


def test_killed_at_random_moments(reference, place):
    """The teacher four times, then the student four times; of three kills, two wait for a new checkpoint, and
    one comes earlier."""
    (home, log), g, kills = place, rng(0, 'kills'), []
    for attempt in itertools.count():
        hits = Counter(name for name, _ in kills)
        target = next(
            (
                folder(c)
                for c in (teacher(), student())
                if hits[folder(c)] < 4 and not (home / folder(c) / 'result.json').exists()
            ),
            None,
        )
        known, seen = len(begun(log)), checkpoints(home)

        def trains():
            return target in dict(begun(log)[known:])  # noqa: B023

        def progresses():
            return trains() and any(k == target for k, _ in checkpoints(home) - seen)  # noqa: B023

        child = start(student(), home, log, pace=0.025)
        if target:
            until(progresses if attempt % 3 else trains, child)
            time.sleep(g.uniform(0, 0.2))
            child.kill()
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, text(log)
        if not (home / target / 'result.json').exists():
            kills.append(begun(log)[-1])
    assert len(kills) >= 6, f'only {len(kills)} kills hit a process that was training: {kills}'
    assert {name for name, step in begun(log) if step > 0} == {
        folder(teacher()),
        folder(student()),
    }, 'both were to go on from a checkpoint'
    assert_same(records(home), reference)


def die_writing(k, when):
    """Have this process killed in its k-th `write_atomic`: with half of the bytes written, or just after the
    rename."""
    call, real = itertools.count(1), {'fsync': os.fsync, 'replace': os.replace}

    def fsync(fd):
        if when == 'half' and next(call) == k:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real['fsync'](fd)

    def rename(a, b):
        real['replace'](a, b)
        if when == 'renamed' and next(call) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = fsync, rename


@pytest.mark.parametrize('when', ['half', 'renamed'])
def test_killed_while_writing(tmp_path, when):
    """Once in each write of a run that saves after every step: holder, config, 4 checkpoints, 2 tensor files,
    curve, provenance, result."""
    few = replace(DATA, people=2, per_person=8)  # 2 steps per epoch
    cfg, log = (
        replace(teacher(recipe=replace(SMALL, epochs=2, milestones=(1.0,))), data=few),
        tmp_path / 'log',
    )
    assert make(cfg, tmp_path / 'undisturbed', log) == 0
    for k in itertools.count(1):
        home = tmp_path / str(k)
        if make(cfg, home, log, (die_writing, k, when), checkpoint_s=1e-9) == 0:
            break
        left = sorted(p.name for p in home.rglob('.*.tmp'))
        assert bool(left) == (when == 'half'), f'write {k}: {left}'
        assert make(cfg, home, log, checkpoint_s=1e-9) == 0, f'write {k}: {left}'
        assert_same(records(home), records(tmp_path / 'undisturbed'))
    assert k - 1 == 11, f'{k - 1} writes'


# ---- two processes, one run ----


def waits(name, child):
    host = platform.node()
    return f'{name}: process {child.pid} on {host} is working on this run; waiting for it'


def test_two_ask_at_once_and_one_trains(reference, tmp_path, place):
    (home, log), other = place, tmp_path / 'second'
    first = start(student(), home, log, pace=0.025)
    until(lambda: begun(log), first)
    second = start(student(), home, other)
    for child in first, second:
        child.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert sorted(begun(log) + begun(other)) == sorted(
        [(folder(teacher()), 0), (folder(student()), 0)]
    )
    assert waits(folder(teacher()), first) in text(other)
    assert_same(records(home), reference)


def test_the_one_that_waits_takes_over_when_the_other_is_killed(reference, tmp_path, place):
    (home, log), other = place, tmp_path / 'second'
    first = start(teacher(), home, log, pace=0.05)
    until(lambda: checkpoints(home), first)
    second = start(teacher(), home, other)
    until(lambda: 'waiting' in text(other), second)
    assert first.is_alive() and not begun(other), 'the second was to wait while the first trains'
    first.kill()
    second.join(120)
    assert second.exitcode == 0 and text(other).count(waits(folder(teacher()), first)) == 1
    [(name, step)] = begun(other)
    assert name == folder(teacher()) and step > 0, 'it was to go on from the checkpoint'
    assert json.loads((home / name / 'holder.json').read_text())['pid'] == second.pid
    assert_same(records(home), of(teacher(), reference))


def test_teachers_come_first_and_are_made_once(place):
    home, log = place
    a, b = student('KD', 1), student('KD', 2)
    assert make(a, home, log) == 0
    assert [name for name, _ in begun(log)] == [folder(teacher()), folder(a)]
    assert make(b, home, log) == 0
    assert [name for name, _ in begun(log)] == [folder(teacher()), folder(a), folder(b)]
    assert make(a, home, log) == 0 and len(begun(log)) == 3


# ---- what is on disk ----


def test_config_on_disk_is_the_config(reference):
    plain = json.loads(reference[f'{folder(student())}/config.json'])
    assert plain == student().to_dict() and plain['teachers'][0]['seed'] == 101
    assert isinstance(student().likelihood, Config), 'the likelihood is part of the name'


# ---- what is loaded, and what is wrong with it ----

PICKLES = re.compile(
    r'\b(c?[pP]ickle|dill|joblib|shelve|marshal)\b|read_pickle|allow_pickle=(?!False)|torch\.(load|save|hub|jit\.load)'
    r'|from torch import .*\b(load|save|hub)\b'
)


# torchvision's CIFAR folders are pickles: opened by one function, once their md5 is that of its table (see
# test_image_data.py)
ALLOWED = {
    'xcl/image_sources.py': ['import pickle', 'pickle.UnpicklingError', 'pickle.loads'],
    # weights that others trained come as .pth: read as tensors and plain values only
    'xcl/weight_files.py': ['torch.load'],
}


def pickling(code):
    "What a tree says of pickles."
    kinds = ast.Import, ast.ImportFrom, ast.Attribute, ast.keyword
    said = [
        ast.unparse(o)
        for o in ast.walk(code)
        if isinstance(o, kinds) and getattr(o, 'arg', 'allow_pickle') == 'allow_pickle'
    ]
    return sorted(o for o in said if PICKLES.search(o))


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_loading_runs_no_code(path):
    """What is stored is safetensors, JSON, CSV or an image: no pickle in any of its disguises. What is not
    ours is in ALLOWED."""
    assert pickling(ast.parse(path.read_text(encoding='utf-8'))) == ALLOWED.get(
        path.relative_to(ROOT).as_posix(), []
    )


def test_the_one_function_that_unpickles_checks_the_md5_first():
    tree = ast.parse((ROOT / 'xcl' / 'image_sources.py').read_text(encoding='utf-8'))
    [f] = [o for o in ast.walk(tree) if isinstance(o, ast.FunctionDef) and pickling(o)]
    lines = [ast.unparse(o) for o in f.body]
    words = 'found = _md5(path)', 'if found != md5:', 'pickle.loads'
    digest, check, load = (next(i for i, o in enumerate(lines) if w in o) for w in words)
    assert f.name == '_unpickled'
    assert digest < check < load
    assert 'raise ValueError' in lines[check]


def test_weights_from_elsewhere_are_read_as_tensors_only():
    "Every torch.load says weights_only=True, literally."
    calls = [
        o
        for o in ast.walk(ast.parse((ROOT / 'xcl' / 'weight_files.py').read_text(encoding='utf-8')))
        if isinstance(o, ast.Call) and ast.unparse(o.func) == 'torch.load'
    ]
    assert calls and all(
        {k.arg: ast.unparse(k.value) for k in o.keywords}.get('weights_only') == 'True'
        for o in calls
    )


TINY = teacher(recipe=replace(SMALL, batch=64, epochs=1, milestones=()))  # one step
DAMAGE = {
    'cut short': lambda b: b[: len(b) // 2],
    'emptied': lambda b: b'',
    'overwritten': lambda b: b'\xff' * len(b),
}


@pytest.fixture
def tiny_run():
    return ensure(TINY, RuntimeConfig('cpu', progress=False))


@pytest.mark.parametrize('how', DAMAGE)
def test_damaged_checkpoint_is_named(tiny_run, how):
    run = Run(TINY, RuntimeConfig('cpu'))
    (run.folder / 'result.json').unlink()
    loop = Trainer(TINY, run)
    loop.train_step(), loop.save()
    path = run.folder / 'checkpoint.safetensors'
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    with pytest.raises(ValueError, match=f'{path} is damaged .* Remove it to have it made again'):
        ensure(TINY, RuntimeConfig('cpu'))
    path.unlink()
    assert ensure(TINY, RuntimeConfig('cpu', progress=False)).result == tiny_run.result


@pytest.mark.parametrize('how', DAMAGE)
def test_damaged_teacher_is_named(tiny_run, how):
    path = tiny_run.folder / 'weights.safetensors'
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    cfg = replace(student('KD'), teachers=(TINY,))
    with pytest.raises(ValueError, match=f'{path} is damaged'):
        ensure(cfg, RuntimeConfig('cpu', progress=False))
    assert not Run(cfg).done


@pytest.mark.parametrize('name', ['result', 'curve', 'provenance'])
def test_damaged_record_is_named(tiny_run, name):
    path = tiny_run.folder / f'{name}.json'
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(ValueError, match=f'{path} is damaged'):
        getattr(tiny_run, name)


@pytest.mark.parametrize('device', ['gpu', 'cuda:99', 'cpu:1', ''])
def test_machine_refuses_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device is '{device}'.*allowed here: auto, cpu"):
        RuntimeConfig(device)
