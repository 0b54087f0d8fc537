"""SimGAN's training killed and taken up again, its samplers, and target domains that are refused. The processes are real: see children.py."""

import os
import re
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from children import (
    assert_same,
    checkpoints,
    folder,
    make,
    records,
    start,
    text,
    undisturbed,
    until,
    watch,
)

from xcl.config import rng
from xcl.gaze_data import RENDERER
from xcl.refine import Refined, RefinerTrainer, SimGAN
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig
from xcl.simulated_eyes import Simulated, SimulatedEyes
from xcl.target_eyes import WebcamEyes, real_eyes

TARGET = WebcamEyes(RENDERER, n=32)
SMALL = SimGAN(
    Simulated(RENDERER),
    TARGET,
    seed=1,
    lam=1.0,
    steps=12,
    n_source=32,
    batch=4,
    width=2,
    pretrain_r=6,
    pretrain_d=6,
    history=6,
    every=5,
)


def watched(pace=0.0, stop=None):
    "In a child: say in its log from where training goes on, with how full a history; rest after each step, or die once step `stop` is saved."
    watch(RefinerTrainer, pace, lambda loop: f', history {loop.history.filled}')
    save = RefinerTrainer.save

    def last(loop):
        save(loop)
        if loop.step == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    RefinerTrainer.save = last


def begun(log):
    return [tuple(map(int, m)) for m in re.findall(r'from step (\d+), history (\d+)', text(log))]


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Records of the run, undisturbed."
    return undisturbed(tmp_path_factory, SMALL, (watched,))


def test_finished_folder_holds_records_and_nothing_else(reference):
    names = {k.split('/', 1)[1] for k in reference}
    sheets = {f'sheets/{s:07}.png' for s in (5, 10, 15, 20, 24)}
    assert (
        names
        == {
            'config.json',
            'curve.json',
            'result.json',
            'refiner.safetensors',
            'discriminator.safetensors',
        }
        | sheets
    )


def test_killed_at_random_moments(reference, tmp_path):
    "In each of the three phases; the history, which fills in the second, is taken up with the rest."
    home, log, g = tmp_path / 'home', tmp_path / 'log', rng(0, 'kills')
    home.mkdir()
    while True:  # comes to an end, because a process is killed only once it has saved a later step
        seen = checkpoints(home)
        child = start(SMALL, home, log, (watched, 0.15), checkpoint_s=0.02)
        if not begun(log) or begun(log)[-1][0] < 16:
            until(lambda: checkpoints(home) - seen, child)  # noqa: B023
            time.sleep(g.uniform(0, 0.3))
            child.kill()
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, text(log)
    steps, held = zip(*begun(log))
    phases = Counter('R' if s < 6 else 'D' if s < 12 else 'both' for s in steps[1:])
    assert len(steps) > 4 and len(phases) == 3, f'too few kills hit the training: {begun(log)}'
    assert max(held) == 6, 'a full history was to be taken up'
    assert_same(records(home), reference)


@pytest.mark.parametrize('stop', [3, 8, 9, 12, 17, 23])
def test_stopped_after_a_step(reference, tmp_path, stop):
    "In each phase, within an interval and at its end, with the history empty, half full and full."
    home, log = tmp_path / 'home', tmp_path / 'log'
    assert make(SMALL, home, log, (watched, 0.0, stop), checkpoint_s=1e-9) == -signal.SIGKILL
    assert make(SMALL, home, log, (watched,)) == 0
    assert begun(log)[1] == (stop, min(6, 2 * max(0, stop - 6)))
    assert_same(records(home), reference)


def test_a_checkpoint_without_its_history_shows():
    "The records would not be the same: the check above can fail."
    a, b = (ensure(replace(SMALL, history=k), RuntimeConfig('cpu', progress=False)) for k in (6, 7))
    assert not np.array_equal(
        a.tensors('discriminator')['conv1.weight'], b.tensors('discriminator')['conv1.weight']
    )


# ---- samplers ----


def test_a_sampler_trains_its_refiner_and_its_rows_join():
    runtime = RuntimeConfig('cpu', progress=False)
    a = Refined(SMALL).open(runtime).make(3, 0, 70)
    b = (
        Refined(SMALL).open(runtime).make(3, 33, 65)
    )  # a process of its own would give the same: nothing is carried over
    assert all(np.array_equal(a[k][33:65], b[k]) for k in a)
    rendered = SMALL.source.open(runtime).make(3, 0, 70)
    assert np.array_equal(a['y'], rendered['y']) and np.array_equal(a['aux'], rendered['aux'])


def test_the_gaze_evaluator_is_validated_on_other_people():
    train, val = SimulatedEyes(SMALL.source, seed=2, n=64, n_val=40).load(RuntimeConfig('cpu'))
    assert (len(train), len(val)) == (64, 40) and not set(train.group.tolist()) & set(
        val.group.tolist()
    )
    with pytest.raises(ValueError, match=r'n is 40.*a multiple of 32'):
        SimulatedEyes(SMALL.source, seed=2, n=40)


# ---- target domains ----

EYES = np.arange(32 * 36 * 60, dtype=np.uint32).reshape(32, 36, 60).astype(np.uint8)
WRONG = {
    'centres': (
        dict(image=EYES[:, :9, :15]),
        r'image is uint8 \(32, 9, 15\); expected uint8 \(n, 36, 60\)',
    ),
    'floats': (dict(image=EYES / 255), r'image is float64 \(32, 36, 60\); expected uint8'),
    'colour': (dict(image=EYES[..., None]), r'image is uint8 \(32, 36, 60, 1\); expected uint8'),
    'unnamed': (dict(x=EYES), r'no array `image`'),
    'none': (dict(image=EYES[:0]), r'image is uint8 \(0, 36, 60\); expected uint8'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_target_is_refused(name, tmp_path):
    arrays, message = WRONG[name]
    np.savez(tmp_path / 'eyes.npz', **arrays)
    with pytest.raises(ValueError, match=rf'eyes\.npz.*{message}'):
        real_eyes(tmp_path / 'eyes.npz')


def test_pickles_are_not_opened(tmp_path):
    np.savez(tmp_path / 'eyes.npz', image=np.array([print], dtype=object))
    with pytest.raises(ValueError, match='expected an .npz of plain arrays'):
        real_eyes(tmp_path / 'eyes.npz')


def untrained(xcl_home):
    return not list(xcl_home.rglob('*.safetensors'))


def test_too_few_eyes_are_refused_before_anything_is_trained(tmp_path, xcl_home):
    np.savez(tmp_path / 'eyes.npz', image=EYES[:3])
    with pytest.raises(ValueError, match='the target domain has 3 eyes; allowed: 4 or more'):
        ensure(
            replace(SMALL, target=real_eyes(tmp_path / 'eyes.npz')),
            RuntimeConfig('cpu', progress=False),
        )
    assert untrained(xcl_home)


def test_a_file_that_has_changed_is_refused(tmp_path, xcl_home):
    np.savez(tmp_path / 'eyes.npz', image=EYES)
    cfg = replace(SMALL, target=real_eyes(tmp_path / 'eyes.npz'))
    np.savez(tmp_path / 'eyes.npz', image=EYES[::-1])
    with pytest.raises(ValueError, match='has changed'):
        ensure(cfg, RuntimeConfig('cpu', progress=False))
    assert untrained(xcl_home)


def test_real_eyes_are_named_by_their_pixels(tmp_path):
    "Not by where they lie: the same eyes elsewhere are the same run."
    np.savez(tmp_path / 'a.npz', image=EYES)
    np.savez(tmp_path / 'b.npz', image=EYES, other=np.zeros(3))
    np.savez(tmp_path / 'c.npz', image=EYES + 1)
    a, b, c = (replace(SMALL, target=real_eyes(tmp_path / f'{k}.npz')) for k in 'abc')
    assert a.hash == b.hash != c.hash and str(tmp_path) not in str(a.to_dict())


# ---- names ----


def test_names_stay():
    "Hashes of what an experiment is made of. Where one moves, runs that exist would be made again."
    gan = SimGAN(Simulated(1), WebcamEyes(1), seed=1, lam=1.0, steps=1000)
    assert {
        k: v.hash
        for k, v in dict(
            gan=gan,
            sampler=Refined(gan),
            simulator=gan.source,
            evaluator=SimulatedEyes(gan.source, 1),
        ).items()
    } == PINNED
    assert folder(gan).startswith('simgan-webcameyes-lam1-seed1-')


PINNED = {
    'gan': '9b04bc654703',
    'sampler': 'fdd1d8b5ecab',
    'simulator': 'a3175a05d4ef',
    'evaluator': '7b77408499c5',
}
