"""The target cache across processes and mishaps: it changes no weight, and where it cannot be used, nothing
is lost and nothing trained.

Digits, networks of width 16, 128 training images, eight steps. What every test needs (the decoded digits and
two finished teachers) is copied into its home. Training that is compared bit by bit runs in children, which
have one thread (see children.py)."""

import errno
import itertools
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import (
    HALF_CUT,
    assert_same,
    begun,
    checkpoints,
    digit_net,
    folder,
    make,
    of,
    records,
    start,
    taught_digits,
    text,
    until,
)

from xcl.config import rng
from xcl.data import CropFlip
from xcl.files import read_tensors, write_tensors
from xcl.likelihoods import Categorical
from xcl.recipe import Recipe
from xcl.records import RecordFile, record_type
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.targets import TargetCache
from xcl.teachers import Ensemble
from xcl.train import METHODS
from xcl.trainer import Trainer
from xcl.transfer import CutMix, Empirical, RandomChoice

SMALL = Recipe('sgd', 0.05, 32, 2, (1.5,), weight_decay=5e-4)  # 8 steps, 4 of them to an epoch
LIVE, STORE = (
    RuntimeConfig('cpu', progress=False, checkpoint_s=1e9, target_cache=s) for s in (False, True)
)
MEMBERS = 2


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A home with decoded digits and finished teachers, and the configs that everything here derives from."
    return taught_digits(tmp_path_factory.mktemp('base'), SMALL, MEMBERS)


def student(base, method='XCL-Mix', targets='exact', width=4, epochs=2, T=1.0):
    recipe = replace(SMALL, epochs=epochs)
    return digit_net(base.data, METHODS[method], recipe, 1, base.members, width, T, targets=targets)


@pytest.fixture
def ask(base, xcl_home):
    "A copy of the base in this test's home, and the maker of students."
    shutil.copytree(base.home, xcl_home)
    return partial(student, base)


@pytest.fixture(scope='module')
def with_store(base, tmp_path_factory):
    "A home in which one student has trained and stored."
    home = tmp_path_factory.mktemp('with_store')
    shutil.copytree(base.home, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('XCL_HOME', str(home))
        ensure(student(base), STORE)
    return home


@pytest.fixture
def filled(ask, with_store, xcl_home):
    "The store of `ask()`, which has finished, in this test's home."
    shutil.copytree(with_store, xcl_home, dirs_exist_ok=True)
    return store(xcl_home)


@pytest.fixture
def asked(monkeypatch):
    "Grows by one with each question to the teacher."
    calls, outputs = [], Ensemble.member_outputs

    def counted(self, *inputs):
        calls.append(len(inputs[0]))
        return outputs(self, *inputs)

    monkeypatch.setattr(Ensemble, 'member_outputs', counted)
    return calls


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(Trainer, 'train_step', lambda self: pytest.fail('it trains'))


def store(home):
    return next(iter(home.glob('targets/*.targets')))


def fills(cfg, runtime=STORE):
    "Train a student, and return its home's store."
    run = ensure(cfg, runtime)
    return store(run.folder.parent)


def same_run(a, b):
    "Two finished runs ended in the same bits."
    assert a.result == b.result and a.curve == b.curve
    a, b = a.tensors(), b.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def live(cfg, home, monkeypatch):
    "The run of `cfg` without any store, in another home, which shares the teachers."
    other = home.parent / 'live'
    shutil.copytree(
        home,
        other,
        ignore=lambda d, names: [n for n in names if n == 'targets' or n.startswith(folder(cfg))],
    )
    with monkeypatch.context() as mp:
        mp.setenv('XCL_HOME', str(other))
        return ensure(cfg, LIVE)


# ---- killed while writing ----


def die_storing(k, when):
    """Have this process killed in its k-th writing of answers: with half of them in the file, before or after
    the record is marked."""
    call, write = itertools.count(1), TargetCache.write

    def dies(self, step, targets):
        if next(call) != k:
            return write(self, step, targets)
        if when == 'half':
            self.map[step]['targets'][: len(targets) // 2] = targets.numpy()[: len(targets) // 2]
        if when == 'unmarked':
            self.map[step]['targets'] = targets.numpy()
        if when == 'marked':
            write(self, step, targets)
        os.kill(os.getpid(), signal.SIGKILL)

    TargetCache.write = dies


@pytest.mark.parametrize('targets', ['half', 'exact'])
def test_killed_while_storing(ask, xcl_home, tmp_path, targets):
    """Three kills in a row, the first two without a checkpoint, so that the next attempt begins at step 0 and
    reads what the others had stored."""
    cfg, log, asks_live, stores = (
        ask(targets=targets),
        tmp_path / 'log',
        tmp_path / 'live',
        tmp_path / 'undisturbed',
    )
    for home in asks_live, *[stores] * (targets == 'exact'):
        shutil.copytree(xcl_home, home)
        assert make(cfg, home, log, checkpoint_s=1e9, cache=home == stores) == 0
    for k, when, every in (2, 'half', 1e9), (2, 'unmarked', 1e9), (2, 'marked', 1e-9):
        assert (
            make(cfg, xcl_home, log, (die_storing, k, when), checkpoint_s=every, cache=True)
            == -signal.SIGKILL
        ), text(log)
    assert make(cfg, xcl_home, log, cache=True) == 0
    assert [step for _, step in begun(log)][-4:] == [0, 0, 0, 3], (
        'one stored, two stored, two more and a checkpoint after each step'
    )
    found = records(xcl_home)
    if targets == 'exact':
        assert_same(found, records(stores))
    assert_same(
        {k: v for k, v in found.items() if not k.startswith('targets/')}, records(asks_live)
    )


def test_killed_classification_run(base, xcl_home, tmp_path):
    """Augmentation, the coin, smoothed labels: killed in the middle of epochs, it ends in the same bytes, the
    entropy of its targets included."""
    assert HALF_CUT.transfer == RandomChoice(CutMix(), Empirical())
    cfg = replace(
        base.members[0],
        data=replace(base.data, augment=CropFlip(4, True)),
        likelihood=Categorical(10, eps=0.1),
        recipe=SMALL,
        seed=7,
    )
    log, undisturbed, g, kills = tmp_path / 'log', tmp_path / 'undisturbed', rng(0, 'kills'), 0
    for home in xcl_home, undisturbed:
        shutil.copytree(base.home, home)
    assert make(cfg, undisturbed, log, checkpoint_s=1e9) == 0
    for _ in range(3):
        seen, child = checkpoints(xcl_home), start(cfg, xcl_home, log, checkpoint_s=1e-9, pace=0.1)
        until(lambda: checkpoints(xcl_home) - seen, child)  # noqa: B023
        time.sleep(g.uniform(0, 0.1))
        child.kill()
        child.join(60)
        kills += child.exitcode == -signal.SIGKILL and not Run(cfg).done
    assert make(cfg, xcl_home, log) == 0
    assert kills >= 2 and any(step % 4 for _, step in begun(log)), f'{kills} kills: {begun(log)}'
    assert_same(records(xcl_home), records(undisturbed))
    run = Run(cfg)
    entropies = [row['target_entropy'] for row in run.curve]
    assert (
        len(entropies) == 2
        and all(0 < h < 1 for h in entropies)
        and run.result['target_entropy'] == sum(entropies) / 2
    )


# ---- another student of the stream ----


@pytest.mark.parametrize(
    'targets, other',
    [('exact', dict(T=5.0)), ('half', dict(width=6))],
    ids=['temperature', 'width'],
)
def test_later_student_asks_nobody(ask, xcl_home, asked, monkeypatch, targets, other):
    "One question, for the shape of an answer, and the weights of the live teacher."
    path = fills(ask(targets=targets))
    before, cfg = path.read_bytes(), ask(targets=targets, **other)
    assert len(asked) == 9, 'eight steps, and one for the shape'
    asked.clear()
    run = ensure(cfg, STORE)
    assert len(asked) == 1 and [o.read_bytes() for o in xcl_home.glob('targets/*.targets')] == [
        before
    ]
    same_run(run, live(cfg, xcl_home, monkeypatch))


def test_longer_student_asks_only_for_what_is_missing(ask, asked, xcl_home, monkeypatch):
    path = fills(ask(epochs=1))
    first = path.read_bytes()
    asked.clear()
    run = ensure(cfg := ask(), STORE)
    assert len(asked) == 5, 'four steps, and one for the shape'
    assert path.read_bytes()[: len(first)] == first and path.stat().st_size > len(first)
    same_run(run, live(cfg, xcl_home, monkeypatch))


def test_another_stream_is_another_file(ask, base, asked):
    first = ask(epochs=1)
    for cfg in first, ask('KD', epochs=1), replace(first, targets='half'), replace(first, seed=2):
        path = fills(cfg)
    assert len(list(path.parent.glob('*.targets'))) == 4 and len(asked) == 4 * 5


def together(*logs):
    "Have this process wait before each step until all the others have begun."
    step = Trainer.train_step

    def waits(self):
        end = time.monotonic() + 60
        while not all(map(begun, logs)):
            time.sleep(0.002 if time.monotonic() < end else sys.exit('the other has not begun'))
        step(self)

    Trainer.train_step = waits


def test_two_students_fill_one_store_at_once(ask, xcl_home, tmp_path):
    "What they write is what one of them writes alone."
    a, b, alone = ask(), ask(T=5.0), tmp_path / 'alone'
    shutil.copytree(xcl_home, alone)
    log, other = tmp_path / 'log', tmp_path / 'other'
    children = [
        start(cfg, xcl_home, mine, (together, log, other), cache=True)
        for cfg, mine in ((a, log), (b, other))
    ]
    for c in children:
        c.join(60)
    assert [c.exitcode for c in children] == [0, 0], text(log) + text(other)
    assert (text(log) + text(other)).count('storing') == 1, 'one of them makes the file'
    for cfg in a, b:
        assert make(cfg, alone, tmp_path / 'log alone', cache=cfg == a) == 0  # b asks live
    for cfg in a, b:
        assert_same(of(cfg, records(xcl_home)), of(cfg, records(alone)))
    assert store(alone).read_bytes() == store(xcl_home).read_bytes()


# ---- stores that cannot be used ----


def refused(cfg, error, words, home):
    """`cfg` is refused with an `error` that says `words`; every record below `home` stays, the student's own
    folder gains its config at most."""
    before = records(home)
    with pytest.raises(error, match=words) as e:
        ensure(cfg, STORE)
    after = records(home)
    new = set(after) - set(before) - {f'{folder(cfg)}/config.json'}
    assert not [n for n in new if not n.endswith('.lock')], new
    assert_same({k: after[k] for k in before}, before)
    assert not Run(cfg).done
    return e.value


def test_store_of_other_weights_is_refused(ask, base, filled, xcl_home, no_step):
    "The same configs, but a teacher was trained again, by another version of torch, say."
    path = xcl_home / folder(base.members[1]) / 'weights.safetensors'
    write_tensors(
        path, {k: v + 1e-6 if v.is_floating_point() else v for k, v in read_tensors(path).items()}
    )
    refused(
        ask(width=6),
        ValueError,
        'holds other soft targets: weights is .*, expected .* Remove it to have the soft targets computed',
        xcl_home,
    )


def full_disk(mp, how):
    "No room, seen beforehand or only when it is taken."
    if how == 'seen':
        mp.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    else:
        mp.setattr(os, 'posix_fallocate', refuse_room, raising=False)


def refuse_room(fd, offset, size):
    "A system that gives part of the room before it finds that there is no more."
    os.ftruncate(fd, offset + size // 2)
    raise OSError(errno.ENOSPC, 'No space left on device')


FULL = dict(
    seen=r'8 steps of soft targets, .* kB each, in \S+ need .* GB more, .* GB are free\. '
    'Nothing was written; without',
    taken='No space left',
)


@pytest.mark.parametrize('how', FULL)
def test_full_disk(ask, xcl_home, no_step, monkeypatch, how):
    cfg = ask()
    full_disk(monkeypatch, how)
    assert refused(cfg, OSError, FULL[how], xcl_home).errno == errno.ENOSPC
    assert not list(xcl_home.glob('targets/*.targets'))


@pytest.mark.parametrize('how', FULL)
def test_full_disk_when_a_run_goes_on(ask, xcl_home, monkeypatch, how):
    """A student with a checkpoint, taken up with a store that finds no room: its checkpoint stays, and
    without the store it ends as if never stopped."""
    cfg = ask()
    ensure(done := ask('KD', epochs=1), LIVE)
    (run := Run(cfg, LIVE)).folder.mkdir()
    loop = Trainer(cfg, run)
    for _ in range(3):
        loop.train_step()
    loop.save()
    with monkeypatch.context() as mp:
        full_disk(mp, how)
        mp.setattr(Trainer, 'train_step', lambda self: pytest.fail('it trains'))
        refused(cfg, OSError, FULL[how], xcl_home)
    assert (
        Run(done).done
        and (run.folder / 'checkpoint.safetensors').exists()
        and not list(xcl_home.glob('targets/*.targets'))
    )
    if how == 'taken':
        return
    fresh = live(cfg, xcl_home, monkeypatch)
    same_run(ensure(cfg, STORE), fresh)


@pytest.mark.parametrize('how', FULL)
def test_full_disk_when_a_store_grows(ask, filled, xcl_home, asked, monkeypatch, how):
    "The store keeps what it has: its length, its answers."
    before = filled.read_bytes()
    with monkeypatch.context() as mp:
        full_disk(mp, how)
        mp.setattr(Trainer, 'train_step', lambda self: pytest.fail('it trains'))
        refused(ask(epochs=9), OSError, FULL[how].replace('8', '36'), xcl_home)
        asked.clear()
    ensure(ask(width=6), STORE)
    assert filled.read_bytes() == before and len(asked) == 1


# ---- damage ----


@pytest.mark.parametrize('records_left', [0, 0.5, 5.5, 7.99])
def test_store_cut_short_is_filled_again(ask, filled, xcl_home, asked, monkeypatch, records_left):
    whole = filled.read_bytes()
    record = (len(whole) - len(head(whole))) // 8
    filled.write_bytes(whole[: len(head(whole)) + int(records_left * record)])
    run = ensure(cfg := ask(T=5.0), STORE)
    assert len(asked) == 1 + 8 - int(records_left) and filled.read_bytes() == whole
    if records_left == 5.5:
        same_run(run, live(cfg, xcl_home, monkeypatch))


def head(whole):
    "The header: a line of JSON, padded to whole pages."
    n = whole.index(b'\n') + 1
    return whole[: n + -n % 4096]


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda b: b[:100], 'is no file of soft targets'),
        (lambda b: b'\xff' * len(b), 'is no file of soft targets'),
        (
            lambda b: b.replace(b'"batch": 32', b'"batch": 64', 1),
            'holds other soft targets: key.batch is 64, expected 32',
        ),
        (
            lambda b: b.replace(b'xcl targets 2', b'xcl targets 3', 1),
            'holds other soft targets: format is xcl targets 3, expected xcl targets 2',
        ),
    ],
)
def test_damaged_header_is_refused(ask, filled, xcl_home, no_step, change, words):
    filled.write_bytes(change(filled.read_bytes()))
    refused(ask(width=6), ValueError, f'{re.escape(str(filled))} {words}', xcl_home)


def test_flipped_bits_are_asked_again(ask, filled, asked, capsys):
    whole = filled.read_bytes()
    record, bad = (len(whole) - len(head(whole))) // 8, bytearray(whole)
    for step in 2, 7:
        bad[len(head(whole)) + step * record + 5] ^= 4
    filled.write_bytes(bad)
    ensure(ask(width=6), STORE)
    assert (
        '2 of 8 stored steps fail their checksum and are computed again' in capsys.readouterr().out
    )
    assert len(asked) == 3 and filled.read_bytes() == whole


# ---- what is in it ----


def test_half_answers_are_live_half_answers(ask, xcl_home):
    "The file holds the members' log-probabilities in half precision, for every step."
    path = fills(ask(targets='half', epochs=1))
    whole = path.read_bytes()
    kind = np.dtype([('targets', '<f2', (32, MEMBERS, 10)), ('checksum', '<u8')])
    found = np.frombuffer(whole[len(head(whole)) :], kind)
    assert len(found) == 4 and (found['checksum'] != 0).all()
    torch.testing.assert_close(
        torch.from_numpy(found['targets'].astype('f4')).exp().sum(-1),
        torch.ones(4, 32, MEMBERS),
        atol=2e-3,
        rtol=0,
    )


def test_a_bar_that_is_looked_at_hides_no_record(tmp_path, monkeypatch):
    "tqdm's update() is True when the bar is redrawn; a record must be verified all the same."
    file = RecordFile(tmp_path / 'x.bin', dict(format='toy'), record_type(v=('<f4', (3,))), 5)
    for i in range(5):
        file.write_record(i, v=np.full(3, i, 'f4'))
    file.map['v'] += 1

    class Redrawn:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            return True

    monkeypatch.setattr('xcl.records.progress', lambda *a, **kw: Redrawn())
    assert file.corrupt_records() == [0, 1, 2, 3, 4]
