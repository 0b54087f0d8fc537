"""Runs that are killed, asked for twice, damaged.

Each ends with the same bytes as an undisturbed run, or with a message.

The processes here are real: see children.py.
"""

import ast
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
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
from xcl.generated import External
from xcl.images import ImageData
from xcl.likelihoods import Gaussian
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.targets import TargetCacheKey
from xcl.train import (
    GAZE_STUDENT,
    GAZE_TEACHER,
    METHODS,
    PYRAMID,
    RESNET,
    TEACHERS,
    Train,
    Trainer,
    added_set,
    gan_rows,
    gaze_students,
    gaze_teachers,
    image_run,
    image_teachers,
)

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / 'xcl').rglob('*.py'))
DATA = EyeData(
    'procedural', split=1, people=3, held_out=1, per_person=32
)  # 64 eyes to train on, 32 to validate
SMALL = replace(GAZE_TEACHER, batch=4, epochs=3, milestones=(1.5,))  # 48 steps


def teacher(seed=101, recipe=SMALL):
    return Train('preact_resnet', Gaussian(), DATA, METHODS['MixUp'], recipe, seed)


def student(method='XCL-Mix', seed=1):
    return Train(
        'lenet',
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
    """The teacher four times, then the student four times; of three kills, two wait for a new
    checkpoint, and one comes earlier."""
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
    "Kill this process in its k-th `write_atomic`: half of the bytes written, or just renamed."
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
    """Once in each write of a run that saves after every step: holder, config, 4 checkpoints,
    2 tensor files, curve, provenance, result."""
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


# ---- names ----


def gaze_names():
    "What the gaze experiment is made of."
    data = EyeData('procedural', split=1)
    members = gaze_teachers(data, 1, 1.0, 2)
    return dict(
        METHODS,
        GAZE_STUDENT=GAZE_STUDENT,
        GAZE_TEACHER=GAZE_TEACHER,
        quarter=GAZE_STUDENT.scaled(0.25),
        data=data,
        **{f'member {i}': c for i, c in enumerate(members)},
        **{f'student {k}': c for k, c in gaze_students(data, 1, 1.0, members).items()},
    )


def image_names():
    "What the sections on CIFAR-100 are made of. A stream names a file of answers."
    data, shapes = (
        ImageData('cifar100', 100, digest='x'),
        dict(resnet18=(('width', 64),), pyramidnet=(('alpha', 240.0), ('depth', 200))),
    )
    ensembles = {k: image_teachers(k, data, 1, 2, 1.0, shapes) for k in TEACHERS}
    members = ensembles['+ CutMix']

    def of(row, **kw):
        return image_run(row, data, 1, 1.0, shapes, members, **kw)

    rows = 'ERM', 'LS 0.1', 'MixUp', 'CutMix', 'KD', 'KD T=5', 'XCL-Mix', 'XCL-Mix T=5'
    how = dict(
        answers='half',
        precision='bf16',
        teacher_precision='bf16',
        val_every=10,
        temper='mean',
        scale_t2=False,
    )
    xcl = of('XCL-Mix')
    stream = TargetCacheKey(
        members, xcl.likelihood.cache_key, data, xcl.method.transfer, RESNET.batch, 1, 'half'
    )
    return dict(
        RESNET=RESNET,
        PYRAMID=PYRAMID,
        images=data,
        stream=stream,
        **{f'{k}, a member': v[1] for k, v in ensembles.items()},
        **{f'images {k}': of(k) for k in rows},
        **{f'other {k}': of('XCL-Mix T=5', **{k: v}) for k, v in how.items()},
        digits=replace(data, source='digits', size=16, train_size=128),
        quarter_resnet=RESNET.scaled(0.25),
    )


def made_names():
    "What section A.6 adds, whatever makes the images. A set and its answers are files."
    data, shapes, maker = (
        ImageData('cifar100', 100, digest='x'),
        dict(resnet18=(('width', 64),)),
        External('a generator', 'x'),
    )
    members, rows = image_teachers('+ CutMix', data, 1, 2, 1.0, shapes), gan_rows(maker, 1000, 1)
    images = {k: image_run(k, data, 1, 1.0, shapes, members, generated=rows) for k in rows}
    eyes = EyeData('procedural', split=1)
    gaze = gaze_students(
        eyes,
        1,
        1.0,
        gaze_teachers(eyes, 1, 1.0, 2),
        generated={'XCL-GAN': added_set(maker, 485_000, 36_000)},
    )['XCL-GAN']

    def stored(word, c):
        t = c.method.transfer
        return {
            f'set of {word}': t.set,
            f'answers to {word}': t.stored_targets(c.teachers, c.likelihood.cache_key, 'fp32'),
        }

    return {
        **images,
        'gaze XCL-GAN': gaze,
        **stored('images', images['XCL-GAN offline']),
        **stored('eyes', gaze),
    }


def names():
    """Hashes of the configs of the experiments. Where one moves, existing results would be made
    again."""
    return {k: v.hash for k, v in (gaze_names() | image_names() | made_names()).items()}


PINNED = {
    'ERM': 'bab48311dda5',
    'LS': '530d53cfe701',
    'MixUp': 'cfc001a50c90',
    'CutMix': '00a90a99d276',
    'KD': 'd9600f3a836d',
    'XCL-Mix': '023848b78390',
    'GAZE_STUDENT': 'd041e88ebf95',
    'GAZE_TEACHER': '5a1468be1eb6',
    'quarter': '18f0e01a35c2',
    'data': '24a71d329b90',
    'member 0': '8c6467e5e2cb',
    'member 1': '8f36061e0987',
    'student ERM, point': '3350701fd646',
    'student ERM': '9721c40a4c30',
    'student MixUp': 'f306097b50ca',
    'student KD': 'daa198765153',
    'student XCL-Mix': '2ea340c7529c',
    'RESNET': 'e6c1816e944e',
    'PYRAMID': '1d77f93a3ece',
    'images': '3989e7bcc1d3',
    'stream': '6eb38c117633',
    'ResNet-18, a member': 'd37b34b8a69f',
    '+ LS 0.1, a member': 'dc8a5c2583ad',
    '+ MixUp, a member': '5ccb57de6ca4',
    '+ CutMix, a member': '9858bbfe6281',
    'PyramidNet + CutMix, a member': 'dfdd405852bb',
    'images ERM': 'b682d62a3ca5',
    'images LS 0.1': '0226bb91f7f3',
    'images MixUp': '6cd4d124b597',
    'images CutMix': 'a03a3dd7f770',
    'images KD': '5433cfd214fc',
    'images KD T=5': '07eb570b9c7f',
    'images XCL-Mix': '078742aaa6d7',
    'images XCL-Mix T=5': '4e473a2996ef',
    'other answers': '95e1bdc5a31d',
    'other precision': '402fa7c9543a',
    'other teacher_precision': 'f1b5173774d9',
    'other val_every': '1345bded2967',
    'other temper': '3d2feed32d00',
    'other scale_t2': 'a01e477aa336',
    'digits': '45bc1bca1071',
    'quarter_resnet': '3286dfc27124',
    'XCL-GAN online': 'e6192b1ff5d6',
    'XCL-GAN offline': '8ac0701f0c17',
    'gaze XCL-GAN': 'b036ab59e096',
    'set of images': '1d2b8a6d087d',
    'answers to images': '4aa56ef511f5',
    'set of eyes': '099c1c08b4d5',
    'answers to eyes': '099c87d87161',
}


@pytest.mark.parametrize('hashseed', ['0', '271828'])
def test_names_are_the_same_in_every_process(hashseed):
    done = subprocess.run(
        [sys.executable, '-c', 'import json, test_runs; print(json.dumps(test_runs.names()))'],
        cwd=Path(__file__).parent,
        env={**os.environ, 'PYTHONHASHSEED': hashseed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == PINNED, (
        'a default or a recipe has changed: see CONTRIBUTING.md, "Defaults are frozen"'
    )


def test_config_on_disk_is_the_config(reference):
    plain = json.loads(reference[f'{folder(student())}/config.json'])
    assert plain == student().to_dict() and plain['teachers'][0]['seed'] == 101
    assert isinstance(student().likelihood, Config), 'the family is part of the name'


# ---- what is loaded, and what is wrong with it ----

PICKLES = re.compile(
    r'\b(c?[pP]ickle|dill|joblib|shelve|marshal)\b|read_pickle|allow_pickle=(?!False)|torch\.(load|save|hub|jit\.load)'
    r'|from torch import .*\b(load|save|hub)\b'
)


ALLOWED = {
    # torchvision's CIFAR folders are pickles: opened by one function, once their md5 is that of its
    # table (see test_image_data.py)
    'xcl/images.py': ['import pickle', 'pickle.UnpicklingError', 'pickle.loads'],
    # weights that others trained come as .pth: read as tensors and plain values only
    'xcl/pretrained.py': ['import pickle', 'pickle.UnpicklingError', 'torch.load'],
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
    """Stored files are safetensors, JSON, CSV or images, never a pickle; ALLOWED lists readers of
    files of other projects."""
    assert pickling(ast.parse(path.read_text(encoding='utf-8'))) == ALLOWED.get(
        path.relative_to(ROOT).as_posix(), []
    )


def test_the_one_function_that_unpickles_checks_the_md5_first():
    tree = ast.parse((ROOT / 'xcl' / 'images.py').read_text(encoding='utf-8'))
    [f] = [o for o in ast.walk(tree) if isinstance(o, ast.FunctionDef) and pickling(o)]
    lines = [ast.unparse(o) for o in f.body]
    check, load = (
        next(i for i, o in enumerate(lines) if word in o) for word in ('_md5(path)', 'pickle.loads')
    )
    assert (
        f.name == '_unpickled'
        and check < load
        and lines[check].startswith('if')
        and 'raise ValueError' in lines[check]
    )


def test_weights_from_elsewhere_are_read_as_tensors_only():
    "Every torch.load says weights_only=True, literally."
    calls = [
        o
        for o in ast.walk(ast.parse((ROOT / 'xcl' / 'pretrained.py').read_text(encoding='utf-8')))
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
