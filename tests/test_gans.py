"""A GAN's training that is killed, damaged or asked for twice ends with the bytes of an undisturbed one.

The processes are real: see children.py.
"""

import itertools
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from children import (
    assert_same,
    begun,
    checkpoints,
    digit_net,
    folder,
    make,
    of,
    records,
    start,
    text,
    undisturbed,
    until,
    watch,
)
from PIL import Image

from xcl.config import rng
from xcl.data import to_bytes
from xcl.diff_augment import DiffAugment
from xcl.gan_figures import sample_steps
from xcl.gan_quality import Evaluator
from xcl.gan_sampling import draw_real
from xcl.gans import BigGAN, GanRecipe, GanTrainer
from xcl.images import image_data
from xcl.recipe import Recipe
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.train import METHODS

RECIPE = GanRecipe(16, 16, 8, 30, d_steps=2, ema=0.9, ema_start=5, augment=DiffAugment())
HERE = RuntimeConfig('cpu', progress=False)


def gan(**kw):
    "Thirty steps on 128 digits, with an evaluator; a row and samples every 8 steps."
    data = image_data('digits', train_size=128, test_size=100)
    recipe = Recipe('sgd', 0.1, 128, 2, gamma=0.2, weight_decay=5e-4)
    evaluator = Evaluator(digit_net(data, METHODS['ERM'], recipe, 1, val_every=9), n=50)
    return BigGAN(**{**dict(data=data, recipe=RECIPE, seed=1, evaluator=evaluator, every=8), **kw})


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Records of the GAN and its evaluator, undisturbed."
    return undisturbed(tmp_path_factory, gan(), (watch, GanTrainer))


def test_finished_folder_holds_records_and_nothing_else(reference):
    names = {k.split('/')[1] for k in of(gan(), reference)}
    samples = {f'samples-{n:07}.safetensors' for n in (8, 16, 24, 30)}
    assert names == samples | {'config.json', 'curve.json', 'result.json', 'weights.safetensors'}


def test_killed_at_random_moments(reference, place):
    "Four times while it trains; every second kill waits for a new checkpoint."
    (home, log), g, kills, name = place, rng(0, 'kills'), [], folder(gan())
    for attempt in itertools.count():
        known, seen = len(begun(log)), checkpoints(home)

        def trains():
            return name in dict(begun(log)[known:])  # noqa: B023

        def progresses():
            return trains() and any(k == name for k, _ in checkpoints(home) - seen)  # noqa: B023

        child = start(gan(), home, log, (watch, GanTrainer, 0.02))
        if len(kills) < 4:
            until(progresses if attempt % 2 else trains, child)
            time.sleep(g.uniform(0, 0.1))
            child.kill()
        child.join(240)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, text(log)
        if trains():
            kills.append(begun(log)[-1])
    steps = [step for k, step in begun(log) if k == name]
    assert len(kills) >= 3 and max(steps) > 0, (
        f'it was to be killed while training, and to go on from a checkpoint: {begun(log)}'
    )
    assert_same(records(home), reference)


def interval_is_last(k):
    "In a child: die as soon as the k-th sample grid is written, before its row is in any checkpoint."
    watch(GanTrainer)
    end, calls = GanTrainer.end_interval, itertools.count(1)

    def dies(self):
        row = end(self)
        if next(calls) == k:
            raise SystemExit(9)
        return row

    GanTrainer.end_interval = dies


@pytest.mark.parametrize('k', [1, 4])
def test_stopped_between_samples_and_checkpoint(reference, place, k):
    "The grid is there, the row is not: both are made again, as they were."
    home, log = place
    assert make(gan(), home, log, (interval_is_last, k)) == 9
    assert len(list(home.glob('*/samples-*'))) == k
    assert make(gan(), home, log, (watch, GanTrainer)) == 0
    assert_same(records(home), reference)


def test_two_ask_at_once_and_one_trains(reference, tmp_path, place):
    (home, log), other = place, tmp_path / 'second'
    first = start(gan(), home, log, (watch, GanTrainer, 0.02))
    until(lambda: folder(gan()) in dict(begun(log)), first)
    second = start(gan(), home, other, (watch, GanTrainer))
    for child in first, second:
        child.join(240)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert (folder(gan()), 0) in begun(log) and not [
        k for k, _ in begun(other) if k == folder(gan())
    ]
    assert_same(records(home), reference)


@pytest.mark.parametrize('how', ['cut short', 'of a narrower network'])
def test_checkpoint_that_does_not_fit_is_refused(how):
    cfg = gan(evaluator=None)
    run = Run(cfg, HERE)
    run.folder.mkdir(parents=True)
    loop = GanTrainer(cfg, run)
    loop.train_step()
    loop.save()
    path = run.folder / 'checkpoint.safetensors'
    if how == 'cut short':
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_bytes(smaller_checkpoint())
    before = path.read_bytes()
    words = re.escape(f'{path} is damaged') if how == 'cut short' else 'size mismatch'
    with pytest.raises((ValueError, RuntimeError), match=words):
        ensure(cfg, HERE)
    assert path.read_bytes() == before


def smaller_checkpoint():
    "The bytes of a checkpoint of another network."
    cfg = gan(evaluator=None, recipe=replace(RECIPE, width_g=8))
    run = Run(cfg, HERE)
    run.folder.mkdir(parents=True)
    loop = GanTrainer(cfg, run)
    loop.save()
    return (run.folder / 'checkpoint.safetensors').read_bytes()


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(monkeypatch):
    cfg = gan(evaluator=None)
    step = GanTrainer.train_step

    def poisoned(self):
        if self.step == 6:
            self.D.verdict.bias.data.fill_(float('nan'))
        step(self)
        self.save()

    monkeypatch.setattr(GanTrainer, 'train_step', poisoned)
    with pytest.raises(
        RuntimeError, match='loss is nan at step 6, whose batch holds the training examples'
    ):
        ensure(cfg, HERE)
    tensors, state = Run(cfg, HERE).load_checkpoint()
    assert (
        state['step'] == 6
        and all(v.isfinite().all() for v in tensors.values())
        and not Run(cfg).done
    )
    monkeypatch.setattr(GanTrainer, 'train_step', step)
    assert ensure(cfg, HERE).result['steps'] == 30, 'it was to go on from the checkpoint'


@pytest.fixture
def one_thread():
    "As the children have: equal bits are promised for equal numbers of threads."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_opened_generator_is_the_run(reference, one_thread):
    "By its config alone it is trained first, evaluator included; the second time it is found."
    first, second = (gan().open_generator(HERE) for _ in range(2))
    run = Run(gan(), HERE)
    assert run.done and Run(gan().evaluator.net, HERE).done and sample_steps(run) == [8, 16, 24, 30]
    z, i, lam = (
        torch.randn(4, 128, generator=torch.Generator().manual_seed(0)),
        torch.arange(4),
        torch.full((4,), 0.3),
    )
    assert torch.equal(first(z, i, i + 1, lam), second(z, i, i + 1, lam))
    assert (run.folder / 'weights.safetensors').read_bytes() == reference[
        f'{folder(gan())}/weights.safetensors'
    ]


def test_images_of_a_folder_are_mirrored_and_never_cropped(tmp_path):
    "At 32x32, where the data's own augmentation would crop as well."
    for split, name, i in itertools.product(('train', 'test'), 'ab', range(4)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            rng(0, f'{split} {name}', i).integers(0, 256, (32, 32, 3), dtype='uint8')
        ).save(tmp_path / split / name / f'{i}.png')
    runtime = RuntimeConfig('cpu', progress=False)
    data = image_data('folder', str(tmp_path))
    cfg = BigGAN(data, replace(RECIPE, batch=8, steps=1, augment=None), 1)
    loop = GanTrainer(cfg, Run(cfg, runtime))
    mirrored = []
    for d in range(4):
        drawn = draw_real(cfg, len(loop.train), d)
        original = loop.train.x[drawn['index']]
        seen = to_bytes(loop.real_batch(drawn)[0])
        alike = (seen == original).flatten(1).all(1)
        assert torch.equal(
            torch.where(alike[:, None, None, None], original, original.flip(-1)), seen
        )
        mirrored += (~alike).tolist()
    assert data.augment.pad == 4 and 0 < sum(mirrored) < len(mirrored)
    generator = cfg.open_generator(runtime)
    assert (generator.size, generator.classes) == (32, 2)
