"""Several processes at one run: the same curve as one process, and what happens when one of them dies.

Two processes on a CPU talk through gloo. They share the parts of a batch, so sums are taken in another order:
equal means equal within rounding."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import SERVER, folder, text
from PIL import Image

from xcl.config import rng
from xcl.data import CropFlip
from xcl.files import read_tensors
from xcl.folders import folder_data
from xcl.gaze_data import EyeData
from xcl.images import image_data
from xcl.likelihoods import Categorical, Gaussian
from xcl.nets import net
from xcl.plan import command, write_plan
from xcl.recipe import Recipe
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig, register_path, registered_paths
from xcl.train import METHODS, Train

EYES = EyeData('procedural', split=1, people=5, held_out=2, per_person=64)
# 6 steps an epoch, each of 4 micro-batches
LENET = Recipe('adam', 1e-4, 32, 3, (2,), weight_decay=1e-4, micro_batch=8)
RESNET = Recipe('sgd', 0.1, 64, 2, (1,), gamma=0.2, weight_decay=5e-4)


def lenet(method='MixUp', **kw):
    return Train(net('lenet'), Gaussian(), EYES, METHODS[method], replace(LENET, **kw), seed=1)


def member(rank, world, meet, home, log, cfg, facts, paths):
    "What one of several processes does."
    os.environ['XCL_HOME'] = str(home)
    torch.set_num_threads(1)
    for digest, path in paths.items():
        register_path(digest, path)
    sys.stdout = sys.stderr = open(f'{log}.{rank}', 'a', buffering=1)
    if world > 1:
        dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    ensure(cfg, RuntimeConfig('cpu', progress=False, checkpoint_s=1e9, **facts))
    if world > 1:
        dist.destroy_process_group()


def made_by(world, cfg, tmp_path, **facts):
    "The finished run of `world` processes, in a home of its own: curve, weights, predictions."
    home, log = tmp_path / f'by{world}', tmp_path / f'log{world}'
    home.mkdir()
    meet, given = tmp_path / f'meet{world}', (home, log, cfg, facts, registered_paths())
    crew = [SERVER.Process(target=member, args=(r, world, meet, *given)) for r in range(world)]
    for c in crew:
        c.start()
    for c in crew:
        c.join(180)
    if any(c.exitcode for c in crew):
        raise RuntimeError('\n'.join(text(Path(f'{log}.{r}')) for r in range(world)))
    at = home / folder(cfg)
    return json.loads((at / 'curve.json').read_text()), *(
        read_tensors(at / f'{k}.safetensors') for k in ('weights', 'predictions')
    )


def assert_close(a, b, rtol, atol):
    "Curves, weights and predictions of two runs are the same within rounding."

    def smooth(row):
        return {
            k: v for k, v in row.items() if k not in ('top1', 'top5', 'ece')
        }  # these jump by whole images

    for x, y in zip(a[0], b[0], strict=True):
        assert smooth(x) == pytest.approx(smooth(y), rel=rtol)
    for x, y in zip(a[1:], b[1:]):
        assert sorted(x) == sorted(y)
        for k in x:
            torch.testing.assert_close(
                x[k], y[k], rtol=rtol, atol=atol, msg=lambda m, k=k: f'{k}: {m}'
            )


# ---- the same curve ----


def test_two_processes_train_as_one(tmp_path):
    "LeNet has no BatchNorm: losses, weights and predictions of one process with the same global batch."
    one, two = (made_by(w, lenet(), tmp_path) for w in (1, 2))
    assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert one[0] != two[0], 'to the last digit would mean that the second process did nothing'


def test_two_processes_train_as_one_in_bf16(tmp_path):
    "Losses, weights and predictions are those of one process, as far as bf16 has digits."
    cfg = replace(lenet(), precision='bf16')
    one, two = (made_by(w, cfg, tmp_path) for w in (1, 2))
    assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_parts_are_the_whole_batch_where_images_do_not_meet(tmp_path, xcl_home):
    "ERM without BatchNorm: the gradient of a batch is the mean of its parts' gradients."
    whole, parts = (
        ensure(
            lenet('ERM', micro_batch=p, optimiser='sgd', lr=3e-4),
            RuntimeConfig('cpu', progress=False),
        )
        for p in (0, 8)
    )  # Adam hides a factor
    for x, y in zip(whole.curve, parts.curve, strict=True):
        assert x == pytest.approx(y, rel=1e-4)


def digits(**kw):
    data = image_data('digits', train_size=128, val_fraction=0.1, augment=CropFlip(2, False))
    recipe = replace(RESNET, **kw)
    return Train(net('resnet18', width=4), Categorical(10), data, METHODS['CutMix'], recipe, 1)


def test_two_processes_with_batchnorm(tmp_path):
    """A part is normalised by itself whoever works on it, and the running statistics are a mean over parts:
    what is left is rounding."""
    cfg = digits(micro_batch=16)
    one, two = (made_by(w, cfg, tmp_path) for w in (1, 2))
    assert_close(one, two, rtol=5e-3, atol=5e-3)
    counts = {v.item() for r in (one, two) for k, v in r[1].items() if 'num_batches' in k}
    assert counts == {cfg.recipe.steps(128) * 4}, 'BatchNorms count parts, whoever saw them'


def test_another_size_of_part_is_another_run(xcl_home):
    "BatchNorm over 16 images is not BatchNorm over 64: the size of a part is science, and in the name."
    a, b = digits(micro_batch=16), digits()
    assert a.hash != b.hash
    losses = [ensure(c, RuntimeConfig('cpu', progress=False)).curve[0]['loss'] for c in (a, b)]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.fixture
def photos(tmp_path):
    "A folder of small JPEGs in two classes."
    for split, n in ('train', 16), ('val', 5):
        for c in 'light', 'dark':
            (tmp_path / 'photos' / split / c).mkdir(parents=True)
            for i in range(n):
                x = rng(0, f'{split}/{c}', i).integers(0, 256, (40, 48, 3)) // 2 + 127 * (
                    c == 'light'
                )
                Image.fromarray(x.astype('uint8')).save(
                    tmp_path / 'photos' / split / c / f'{i}.jpg'
                )
    return tmp_path / 'photos'


def test_two_processes_with_workers_on_a_folder(tmp_path, photos, xcl_home):
    data = folder_data(photos, RuntimeConfig('cpu', workers=0), size=32, resize=36)
    recipe = replace(RESNET, batch=16, micro_batch=8, epochs=2, schedule='cosine', milestones=())
    network = net('imagenet_resnet', depth=10, width=16)
    cfg = Train(network, Categorical(2), data, METHODS['MixUp'], recipe, 1)
    one = made_by(1, cfg, tmp_path, workers=0)
    two = made_by(2, cfg, tmp_path, workers=1)
    assert_close(one, two, rtol=5e-3, atol=5e-3)


# ---- what is refused ----


@pytest.mark.parametrize(
    'facts, world, message',
    [
        ({}, 3, r'3 processes cannot share the 4 micro-batches of a batch of 32 evenly'),
        (dict(world_size=3), 2, r'2 of at least 3 processes were started'),
        (
            dict(target_cache=True),
            2,
            r'2 processes cannot write one target cache; allowed: target_cache = False',
        ),
    ],
    ids=['uneven', 'fewer', 'store'],
)
def test_refused_before_training(facts, world, message, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        made_by(world, lenet(), tmp_path, **facts)
    assert not list((tmp_path / f'by{world}').rglob('checkpoint*'))


def launch(plan, home, processes, *words, torchrun=True):
    "The command that a notebook shows, started."
    line = command(plan, RuntimeConfig('cpu', world_size=processes)).split() + list(words)
    line = (
        [sys.executable, '-m', 'torch.distributed.run', *line[1:]]
        if torchrun
        else [sys.executable, *line[line.index('-m') :]]
    )
    env = {**os.environ, 'XCL_HOME': str(home), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        line,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / 'plan.json'
    write_plan(path, [lenet(epochs=8, milestones=(6.0,))])
    return path


def test_fewer_processes_than_asked_for_is_an_error(plan, tmp_path):
    "Never a quiet run of one."
    done = launch(plan, tmp_path / 'home', 2, torchrun=False)
    said, _ = done.communicate(timeout=120)
    assert (
        done.returncode == 1
        and '2 processes were asked for, 1 started' in said
        and 'Traceback' not in said
    ), said
    assert not (tmp_path / 'home').exists()


# ---- a process dies ----


def workers_under(pid):
    "Process ids of the training processes that a torchrun started."
    out = subprocess.run(
        ['ps', '-o', 'pid=,args=', '--ppid', str(pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in out.splitlines() if 'xcl.launch' in line]


def test_a_killed_process_ends_the_job_and_the_rest_is_done_by_any_number(plan, tmp_path, xcl_home):
    """One of two is killed after a checkpoint: a clear message, an exit code, and one process finishes what
    two began."""
    cfg, home = lenet(epochs=8, milestones=(6.0,)), tmp_path / 'home'
    job = launch(plan, home, 2, '--checkpoint-s', '.05')
    checkpoint = home / folder(cfg) / 'checkpoint.safetensors'
    end = time.monotonic() + 120
    while not checkpoint.exists() and job.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    crew = workers_under(job.pid)
    assert len(crew) == 2, job.communicate()[0]
    os.kill(crew[1], signal.SIGKILL)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and not (home / folder(cfg) / 'result.json').exists()
    how = 'Start the same command again: it goes on from the last checkpoint'
    assert re.search(rf'process 0 of 2 (lost another process|was told to stop) .*{how}', said), said
    state = json.loads(bytes(read_tensors(checkpoint)['_state'].tolist()))
    assert 0 < state['step'] < cfg.recipe.steps(192)
    again = launch(plan, home, 1, torchrun=False)
    said, _ = again.communicate(timeout=180)
    assert (
        again.returncode == 0
        and '1/1' in said
        and Path(home / folder(cfg) / 'result.json').exists()
    ), said
    left_alone = ensure(cfg, RuntimeConfig('cpu', progress=False))
    resumed = json.loads((home / folder(cfg) / 'curve.json').read_text())
    for x, y in zip(left_alone.curve, resumed, strict=True):
        assert x == pytest.approx(y, rel=1e-2)
    made = json.loads((home / folder(cfg) / 'provenance.json').read_text())['device']
    assert 'x 2 processes' in made and ' + ' in made, made
