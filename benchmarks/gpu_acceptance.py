"""The CUDA path of every kind of training: checked against the CPU, looked at for waits, and timed.

    python benchmarks/gpu_acceptance.py --out DIR                  a GPU; five minutes
    python benchmarks/gpu_acceptance.py --out DIR --stages machine equal
    python benchmarks/gpu_acceptance.py --out DIR --device cpu --tiny    a test of this script

Stages:

*machine*   versions, device and flags.
*equal*     a few steps in fp32 without TF32, on the CPU and on the device, from the same initial state:
            relative differences of losses, weights, what they have changed by, and validation
            outputs; and a training that was resumed before its last step, against the one that was
            not: its weights, in terms of the weights and of what the step changed. `fine`: all that
            LIMITS names is below its limit.
*waits*     where in `xcl/` one step waits for the device, and what it launches (bf16; gaze and SimGAN fp32).
*speed*     ms per step (median of five blocks), images/s, share of the peak, memory, at the paper's sizes.

Variants: *eager*; *captured*, a step as one CUDA graph; *compiled*, captured with the student compiled.
*plain* is a loop of a few lines on images that are on the device: no augmentation, no bookkeeping.

Images are random pixels, eyes and photographs are rendered here, teachers and generators are untrained:
neither times nor equality depend on weights. A case that fails is noted, and the next one goes on, in a new
process where the device no longer computes. DIR/report.json is rewritten after each fact; exit code 1 means
that a case failed or is not fine."""

import argparse
import faulthandler
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import xcl
from xcl.config import Config, rng
from xcl.data import CropFlip, Examples
from xcl.drawn_photos import drawn_folder
from xcl.files import write_json, write_tensors
from xcl.folders import Thumbnails, folder_data
from xcl.gans import BIGGAN, BigGAN, GanTrainer, init_networks
from xcl.gaze_data import eye_data
from xcl.likelihoods import Categorical, Gaussian
from xcl.metrics import class_score
from xcl.models.biggan import plain_weights
from xcl.nets import net
from xcl.paper.row import likelihood_of
from xcl.paper.rows import CIFAR, GAN, GAZE, IMAGENET, RECIPES, generated_transfers
from xcl.refine import RefinerTrainer, SimGAN
from xcl.runs import Run
from xcl.runtime import RuntimeConfig, provenance
from xcl.simulated_eyes import simulated_eyes
from xcl.target_eyes import webcam_eyes
from xcl.train import Train
from xcl.trainer import Trainer, build

STAGES = 'machine', 'equal', 'waits', 'speed', 'kernels', 'deterministic'
VARIANTS = dict(
    eager=dict(compile='off', capture=False),
    captured=dict(compile='off', capture=True),
    compiled=dict(compile='on', capture=True),
    deterministic=dict(compile='off', capture=True, deterministic=True),
)
WARM = dict(eager=5, captured=10, compiled=10, deterministic=10)  # steps before a measurement
STEPS = dict(eager=3, captured=6, compiled=6)  # that are compared
TRAINERS = {Train: Trainer, BigGAN: GanTrainer, SimGAN: RefinerTrainer}
PACKAGE = str(Path(xcl.__file__).parent) + os.sep


def runtime_of(device, variant='eager', **more):
    "The runtime of a variant."
    return RuntimeConfig(device, progress=False, checkpoint_s=1e9, **VARIANTS[variant], **more)


# What is trained


@dataclass(frozen=True)
class Scale:
    "Sizes of networks, batches and sets."

    precision: str
    batch: int  # 0: as in the paper
    rate: float  # learning rate, in terms of the paper's; low: rounding errors stay small
    images: int
    eyes: int  # of each of 15 people
    members: int
    width: int  # of the ResNet-18s
    depth: int  # of the PyramidNet
    alpha: float
    gan_width: int
    gan_batch: int
    refiner_width: int
    refiner_batch: int
    rendered: int  # eyes of SimGAN, and as many target eyes
    photos: int  # of each of 12 classes
    photo_size: int
    photo_batch: int  # two micro-batches
    photo_depth: int
    photo_width: int


PAPER = Scale(
    precision='bf16',
    batch=0,
    rate=1.0,
    images=50_000,
    eyes=400,
    members=8,
    width=64,
    depth=200,
    alpha=240.0,
    gan_width=256,
    gan_batch=50,
    refiner_width=64,
    refiner_batch=512,
    rendered=2048,
    photos=48,
    photo_size=224,
    photo_batch=256,
    photo_depth=50,
    photo_width=64,
)
SMALL = Scale(
    precision='fp32',
    batch=16,
    rate=0.1,
    images=64,
    eyes=16,
    members=2,
    width=64,
    depth=20,
    alpha=48.0,
    gan_width=32,
    gan_batch=8,
    refiner_width=16,
    refiner_batch=32,
    rendered=64,
    photos=8,
    photo_size=48,
    photo_batch=16,
    photo_depth=18,
    photo_width=32,
)
TINY = replace(
    SMALL,
    width=16,
    depth=11,
    alpha=16.0,
    gan_width=8,
    refiner_width=4,
    refiner_batch=16,
    photo_size=32,
    photo_depth=10,
    photo_width=16,
)


@dataclass(frozen=True)
class Noise(Config):
    "Random pixels and labels in the place of CIFAR-100."

    images: int
    classes: int = 100
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.25, 0.25, 0.25)
    augment: object = CropFlip()

    def load(self, runtime):
        "Return as many training images, and the first 256 of them to validate on."
        g = rng(0, 'noise')
        x = g.integers(256, size=(self.images, 3, 32, 32), dtype=np.uint8)
        y = g.integers(self.classes, size=self.images)
        found = Examples(torch.from_numpy(x), torch.from_numpy(y))
        return found, found.take(slice(0, 256))

    def score(self, likelihood, out, val):
        "`class_score`."
        return class_score(out, val.y)


def untrained(cfg):
    "Return `cfg`, with a folder that passes for its finished run and holds initial weights."
    run = Run(cfg)
    if not run.done:
        run.folder.mkdir(parents=True, exist_ok=True)
        gan = isinstance(cfg, BigGAN)
        weights = plain_weights(init_networks(cfg)[0]) if gan else build(cfg).state_dict()
        write_tensors(run.folder / 'weights.safetensors', weights)
        write_json(run.folder / 'result.json', {})
    return cfg


class Configs:
    "Configs of all kinds of training at one scale."

    def __init__(self, scale, device):
        self.scale = scale
        self.device = device
        self.noise = Noise(scale.images)
        self.eyes = eye_data('procedural', '', split=1, per_person=scale.eyes)

    def recipe(self, network, row=None, batch=0, **kw):
        "Return the paper's recipe, its learning rates scaled to the batch and by `rate`."
        paper = replace(RECIPES[network], **dict(row.recipe if row else ()))
        batch = batch or self.scale.batch or paper.batch
        share = self.scale.rate * batch / paper.batch
        rates = dict(lr=paper.lr * share, warmup_lr=paper.warmup_lr * share)
        return replace(paper, batch=batch, **rates, **kw)

    def image(self, row, network='resnet18', members=0, seed=1, **kw):
        "Return a network for 32x32 images; a student has `members` untrained CutMix teachers."
        s = self.scale
        pyramid = network == 'pyramidnet'
        sizes = dict(depth=s.depth, alpha=s.alpha) if pyramid else dict(width=s.width)
        likelihood = likelihood_of(row, Categorical, classes=self.noise.classes)
        parts = net(network, **sizes), likelihood, self.noise, row.method, self.recipe(network)
        if not row.objective.needs_teacher:
            return Train(*parts, seed, precision=s.precision, **kw)
        seeds = range(1001, 1001 + (members or s.members))
        teachers = tuple(untrained(self.image(CIFAR['CutMix'], seed=k)) for k in seeds)
        precisions = dict(precision=s.precision, teacher_precision=s.precision)
        return Train(*parts, seed, teachers, **precisions, **kw)

    def generated(self):
        "Return a student of images that an untrained BigGAN generates for the step."
        transfers = generated_transfers(untrained(self.gan()), 256, 1)
        return self.image(GAN['XCL-GAN online'].on(transfers['XCL-GAN online']))

    def gaze(self, row, seed=1):
        "Return a network for eyes, in fp32 as in the paper."
        kind = 'preact_resnet' if row.name == 'teacher' else 'lenet'
        parts = net(kind), likelihood_of(row, Gaussian), self.eyes, row.method, self.recipe(kind)
        if not row.objective.needs_teacher:
            return Train(*parts, seed)
        seeds = range(1001, 1001 + self.scale.members)
        return Train(*parts, seed, tuple(untrained(self.gaze(GAZE['teacher'], k)) for k in seeds))

    @cached_property
    def photographs(self):
        "Rendered JPEGs in class folders."
        s = self.scale
        folder = drawn_folder(0, s.photos, 8)
        sizes = dict(size=s.photo_size, resize=s.photo_size * 8 // 7)
        return folder_data(folder, runtime_of(self.device), **sizes)

    def photo(self, row, seed=1):
        "Return a ResNet for photographs, of two micro-batches; a student has one such teacher."
        s, kind = self.scale, 'imagenet_resnet'
        network = net(kind, depth=s.photo_depth, width=s.photo_width)
        likelihood = likelihood_of(row, Categorical, classes=self.photographs.classes)
        recipe = self.recipe(kind, row, s.photo_batch, micro_batch=s.photo_batch // 2)
        parts = network, likelihood, self.photographs, row.method, recipe, seed
        if not row.objective.needs_teacher:
            return Train(*parts, precision=s.precision)
        teacher = untrained(self.photo(IMAGENET['teacher'], 1001))
        precisions = dict(precision=s.precision, teacher_precision=s.precision)
        return Train(*parts, (teacher,), **precisions)

    def gan(self):
        "Return a BigGAN for the photographs at 32x32."
        s, found = self.scale, self.photographs
        small = Thumbnails('folder', found.classes, digest=found.digest)
        widths = dict(width_g=s.gan_width, width_d=s.gan_width, batch=s.gan_batch)
        return BigGAN(small, replace(BIGGAN, **widths), 1, precision=s.precision)

    def refiner(self):
        "Return a SimGAN in the phase in which both networks are trained."
        s = self.scale
        sets = simulated_eyes(), webcam_eyes(n=s.rendered)
        sizes = dict(n_source=s.rendered, batch=s.refiner_batch, width=s.refiner_width)
        return SimGAN(*sets, 1, 1.0, 10_000, pretrain_r=0, pretrain_d=0, every=5000, **sizes)


def trainer_of(cfg, runtime, resume=False):
    "A new training, or one from its checkpoint."
    run = Run(cfg, runtime)
    run.folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        run.checkpoint.unlink(missing_ok=True)
    return TRAINERS[type(cfg)](cfg, run)


def end(trainer):
    "End the workers and remove the checkpoint of a training."
    if isinstance(trainer, Trainer):
        trainer.train.shutdown()
    trainer.run.checkpoint.unlink(missing_ok=True)


# Cases


@dataclass(frozen=True)
class Case:
    "A kind of training, in one variant."

    name: str
    make: Callable  # () -> config
    variant: str = 'eager'

    @property
    def title(self):
        "Return the name in the report."
        return f'{self.name}, {self.variant}'


def in_variants(makers, variants):
    "Cases of some kinds of training, variant by variant."
    return [Case(name, make, v) for v in variants for name, make in makers.items()]


def of(make, row, *args, **kw):
    "A function that makes the config of a row."
    return lambda: make(row, *args, **kw)


def small_kinds(c):
    "Kinds of training that are compared: name -> function () -> config."
    images = {f'resnet18 {k}': of(c.image, CIFAR[k]) for k in ('ERM', 'CutMix', 'KD', 'XCL-Mix')}
    return {
        **{f'gaze {k}': of(c.gaze, GAZE[k]) for k in ('ERM', 'XCL-Mix', 'teacher')},
        **images,
        'resnet18 KD half': of(c.image, CIFAR['KD'], targets='half'),
        'resnet18 XCL-GAN online': c.generated,
        'binary_resnet18 ERM': of(c.image, CIFAR['ERM'], 'binary_resnet18'),
        'pyramidnet CutMix': of(c.image, CIFAR['CutMix'], 'pyramidnet'),
        **{f'photographs {k}': of(c.photo, IMAGENET[k]) for k in ('ERM', 'XCL-Mix')},
        'BigGAN': c.gan,
        'SimGAN': c.refiner,
    }


def equal_cases(c):
    "All in eager mode, all captured, then three that are compiled."
    kinds = small_kinds(c)
    compiled = {k: kinds[k] for k in ('resnet18 ERM', 'resnet18 XCL-Mix', 'gaze XCL-Mix')}
    return in_variants(kinds, ['eager', 'captured']) + in_variants(compiled, ['compiled'])


def large_kinds(c):
    "Kinds of training that are timed, as of `small_kinds`: the important ones, and the rest."
    m = c.scale.members
    first = {
        'resnet18 ERM': of(c.image, CIFAR['ERM']),
        f'resnet18 XCL-Mix {m}': of(c.image, CIFAR['XCL-Mix']),
        'gaze ERM': of(c.gaze, GAZE['ERM']),
        f'gaze XCL-Mix {m}': of(c.gaze, GAZE['XCL-Mix']),
        'BigGAN': c.gan,
    }
    rest = {
        'SimGAN': c.refiner,
        'resnet18 XCL-Mix 1': of(c.image, CIFAR['XCL-Mix'], members=1),
        'resnet18 CutMix': of(c.image, CIFAR['CutMix']),
        'pyramidnet CutMix': of(c.image, CIFAR['CutMix'], 'pyramidnet'),
        'binary_resnet18 ERM': of(c.image, CIFAR['ERM'], 'binary_resnet18'),
        'photographs ERM': of(c.photo, IMAGENET['ERM']),
        'resnet18 XCL-GAN online': c.generated,
    }
    return first, rest


def waits_cases(c):
    "All that are timed but the PyramidNet, whose step differs from a ResNet's in its network alone."
    first, rest = large_kinds(c)
    kinds = {k: v for k, v in {**first, **rest}.items() if not k.startswith('pyramidnet')}
    return in_variants(kinds, ['eager', 'captured'])


def speed_cases(c):
    "The important ones in eager mode, captured and compiled; then the rest."
    first, rest = large_kinds(c)
    students = {k: v for k, v in first.items() if k not in ('gaze ERM', 'BigGAN')}
    return [
        *(Case(k, make, v) for k, make in first.items() for v in ('eager', 'captured')),
        Case('resnet18 ERM', first['resnet18 ERM'], 'plain'),
        *in_variants(students, ['compiled']),
        *(Case(k, make, v) for k, make in rest.items() for v in ('eager', 'captured')),
    ]


# Equality


def last_losses(trainer):
    "Losses of the last step, as a tensor on the device."
    step = trainer.step - 1
    if isinstance(trainer, Trainer):
        return trainer.losses[step % trainer.per_epoch].clone()
    i = step % trainer.cfg.every
    if isinstance(trainer, GanTrainer):
        return torch.stack([trainer.loss_d[i], trainer.loss_g[i]])
    return trainer.track[:, i].clone()


def weights(trainer):
    "Weights and statistics of all networks: name -> tensor."
    names = [k for k in ('net', 'G', 'D', 'ema', 'R') if hasattr(trainer, k)]
    states = {k: getattr(trainer, k).state_dict() for k in names}
    return {
        f'{name}.{k}': v.detach().double().cpu()
        for name, state in states.items()
        for k, v in state.items()
        if v.is_floating_point()
    }


def has_graph(trainer):
    "Whether a CUDA graph takes the steps."
    captured = getattr(trainer, 'captured', None)
    return captured is not None and captured.graph is not None


def outputs(trainer):
    "Outputs on the validation set; None of a GAN."
    return trainer.validate()[0].double().cpu() if isinstance(trainer, Trainer) else None


def advance(trainer, steps):
    "Take some steps; return their losses."
    losses = []
    for _ in range(steps):
        trainer.train_step()
        losses.append(last_losses(trainer))
    return losses


def on_cpu(make):
    """What a training gives on the CPU: number of steps -> (losses, weights, validation outputs);
    0 -> initial weights."""
    trainer = trainer_of(make(), runtime_of('cpu', workers=0))
    losses, found = [], {0: weights(trainer)}
    for n in sorted(set(STEPS.values())):
        losses += advance(trainer, n - trainer.step)
        found[n] = torch.stack(losses), weights(trainer), outputs(trainer)
    end(trainer)
    return found


def differ(found, expected):
    "Norm of the difference of two tensors, in terms of the second's norm."
    found, expected = (t.detach().double().cpu().flatten() for t in (found, expected))
    return float(f'{((found - expected).norm() / expected.norm().clamp_min(1e-6)).item():.1e}')


def differ_all(found, expected):
    "`differ` of all tensors of two dicts as one."
    return differ(*(torch.cat([d[k].flatten() for k in expected]) for d in (found, expected)))


def differ_change(found, expected, before):
    "`differ` of what was learnt since `before`, without running statistics."
    learnt = [k for k in before if 'running' not in k]
    changes = ({k: state[k] - before[k] for k in learnt} for state in (found, expected))
    return differ_all(*changes)


def difference_after_resume(trainer, cfg, runtime):
    "Take one step with and without a resume; (its losses, how the weights differ after it)."
    before = weights(trainer)
    trainer.save()
    resumed = trainer_of(cfg, runtime, resume=True)
    losses = advance(trainer, 1)
    advance(resumed, 1)
    found, expected = weights(resumed), weights(trainer)
    end(resumed)
    of_step = differ_change(found, expected, before)
    return losses, dict(resumed=differ_all(found, expected), resumed_of_step=of_step)


LIMITS = dict(loss=2e-3, resumed=1e-3, resumed_of_step=0.1)


def compared(case, reference, device):
    "Differences of a case from the CPU, and of a resumed training from one that was not."
    cfg, runtime, n = case.make(), runtime_of(device, case.variant, workers=0), STEPS[case.variant]
    trainer = trainer_of(cfg, runtime)
    losses = advance(trainer, n - 1)
    last, facts = difference_after_resume(trainer, cfg, runtime)
    expected_losses, expected, expected_outputs = reference[n]
    found = weights(trainer)
    worst = max(expected, key=lambda k: differ(found[k], expected[k]))
    facts |= dict(
        loss=differ(torch.stack(losses + last), expected_losses),
        weights=differ_all(found, expected),
        change=differ_change(found, expected, reference[0]),
        worst=f'{worst} {differ(found[worst], expected[worst])}',
    )
    if expected_outputs is not None:
        facts['validation'] = differ(outputs(trainer), expected_outputs)
    end(trainer)
    fine = all(facts[k] < limit for k, limit in LIMITS.items())
    return dict(fine=fine, steps=n, graph=has_graph(trainer), **facts)


def stage_equal(session):
    "Compare every kind of training with the CPU."
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    references, device = {}, session.a.device

    def compare(case):
        if case.name not in references:
            references[case.name] = on_cpu(case.make)
        return compared(case, references[case.name], device)

    for case in equal_cases(Configs(TINY if session.a.tiny else SMALL, device)):
        session.attempt('equal', case.title, compare, case)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


# Waits


def place_in_package(filename, lineno):
    "The innermost line of the package that is being executed; the given one where there is none."
    for frame, line in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f'{name.removeprefix(PACKAGE)}:{line}'
    return f'{Path(filename).name}:{lineno}'


def waits_in(step):
    "Lines at which a step waits for the device: 'file:line' -> how often."
    found = Counter()

    def note(message, category, filename, lineno, file=None, line=None):
        if 'called a synchronizing' in str(message):
            found[place_in_package(filename, lineno)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode('warn')
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return dict(found)


CALLS = dict(
    kernel_launches=('cudaLaunchKernel', 'cuLaunchKernel'),
    memcpys=('cudaMemcpy',),
    stream_syncs=('cudaStreamSynchronize', 'cudaEventSynchronize'),
    graph_launches=('cudaGraphLaunch',),
)  # name -> beginnings of names of CUDA functions


def calls_in(step):
    "Calls of CUDA that a step makes, and the time in which the device is busy."
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = recorded.key_averages()
    busy = [e for e in events if e.device_type == DeviceType.CUDA]
    return dict(
        {k: sum(e.count for e in events if e.key.startswith(v)) for k, v in CALLS.items()},
        device_events=sum(e.count for e in busy),
        device_ms=round(sum(e.self_device_time_total for e in busy) / 1e3, 3),
    )


def waited(case, device):
    "Waits and calls of one step."
    trainer = trainer_of(case.make(), runtime_of(device, case.variant))
    for _ in range(WARM[case.variant]):
        trainer.train_step()
    torch.cuda.synchronize()
    places = waits_in(trainer.train_step)
    calls = calls_in(trainer.train_step)
    end(trainer)
    return dict(waits=sum(places.values()), graph=has_graph(trainer), **calls, places=places)


def stage_waits(session):
    "Look at what a step waits for and launches; on CUDA only."
    device = session.a.device
    if not session.cuda:
        session.keep('waits', 'all', skipped='no CUDA device')
        return
    for case in waits_cases(session.large):
        session.attempt('waits', case.title, waited, case, device)


# Speed


def settle(device):
    "Wait until the device has done all its work."
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def timed(step, n, device):
    "Milliseconds per step, over n steps."
    settle(device)
    t = time.perf_counter()
    for _ in range(n):
        step()
    settle(device)
    return 1e3 * (time.perf_counter() - t) / n


def flops_of(step):
    "Floating-point operations of one step: all networks, forward and backward."
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def plain_step(cfg, device):
    "A step of a plain loop: random images that are on the device, and PyTorch's default SGD."
    r, model = cfg.recipe, build(cfg).to(device).train()
    opt = torch.optim.SGD(model.parameters(), r.lr, r.momentum, 0, r.weight_decay, nesterov=True)
    train = cfg.data.load(None)[0].to(device)
    bf16 = cfg.precision == 'bf16'

    def step():
        index = torch.randint(len(train), (r.batch,), device=device)
        x, y = train.x[index].float().div_(255), train.y[index]
        opt.zero_grad()
        with torch.autocast(device.split(':')[0], torch.bfloat16, enabled=bf16):
            out = model(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(out.float(), y).backward()
        opt.step()

    return step


def images_of(cfg):
    "Images in a step: of a BigGAN the real ones, of a SimGAN the rendered ones that train R."
    if isinstance(cfg, BigGAN):
        return cfg.recipe.batch * cfg.recipe.d_steps
    return cfg.batch * cfg.r_per_d if isinstance(cfg, SimGAN) else cfg.recipe.batch


def blocks_of(step, warm, a):
    "Milliseconds per step of five blocks, after some steps; a block takes a sixth of a second."
    timed(step, 1 if a.tiny else warm, a.device)
    one = timed(step, 1 if a.tiny else 2, a.device)
    n = 1 if a.tiny else int(np.clip(160 / one, 2, 50))
    return [timed(step, n, a.device) for _ in range(2 if a.tiny else 5)]


def epoch_time(trainer, ms, a):
    "Milliseconds per step over an epoch, what is drawn for the next one included; {} above 3 s."
    n = getattr(trainer, 'per_epoch', 0)
    if not 0 < n * ms < 3000:
        return {}
    return dict(epoch_ms=round(timed(trainer.train_step, n, a.device), 3), per_epoch=n)


def rates(ms, cfg, work, a):
    "What a time per step means; `work`: operations of a step, None where they are not known."
    facts = dict(ms=round(ms, 3), images_per_s=round(images_of(cfg) / ms * 1e3))
    if work:
        facts |= dict(tflop=round(work / 1e12, 4), peak_share=round(work / ms / 1e9 / a.peak, 4))
    return facts


def measured(case, work, a):
    "Speed and memory of a case; `work` keeps the operations of a step for its other variants."
    cuda, began = a.device.startswith('cuda'), time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    cfg = case.make()
    plain = case.variant == 'plain'
    trainer = None if plain else trainer_of(cfg, runtime_of(a.device, case.variant))
    step = plain_step(cfg, a.device) if plain else trainer.train_step
    step()
    settle(a.device)
    first_s = round(time.perf_counter() - began, 1)
    blocks = blocks_of(step, WARM.get(case.variant, 5), a)
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    if case.variant == 'eager':
        work[case.name] = flops_of(step)
    ms = float(np.median(blocks))
    spread = [round(t, 3) for t in (min(blocks), max(blocks))]
    facts = dict(rates(ms, cfg, work.get(case.name), a), spread=spread, first_step_s=first_s)
    if trainer:
        facts |= dict(graph=has_graph(trainer), **epoch_time(trainer, ms, a))
        end(trainer)
    return dict(facts, peak_gb=round(memory, 2))


def stage_speed(session):
    "Time every kind of training."
    work = {}
    for case in speed_cases(session.large):
        session.attempt('speed', case.title, measured, case, work, session.a)


# Determinism, and what a step consists of


def repeated(case, a):
    "Whether two runs, and a run that was resumed, give the same bits; and the price."
    cfg, runtime = case.make(), runtime_of(a.device, case.variant)
    first, second = (trainer_of(cfg, runtime) for _ in range(2))
    advance(first, 8)
    advance(second, 5)
    second.save()
    resumed = trainer_of(cfg, runtime, resume=True)
    advance(resumed, 3)
    expected, found = weights(first), weights(resumed)
    same = all(torch.equal(v, found[k]) for k, v in expected.items())
    end(resumed)
    ms = float(np.median(blocks_of(first.train_step, WARM[case.variant], a)))
    end(first)
    difference = differ_all(found, expected)
    asked = runtime.deterministic or a.device == 'cpu'
    facts = dict(same_bits=same, difference=difference, ms=round(ms, 3), graph=has_graph(first))
    return dict(fine=same or not asked, **facts)


def stage_deterministic(session):
    "Repeat and resume trainings; the process stays deterministic, so this stage is the last."
    first, _ = large_kinds(session.large)
    for case in in_variants(first, ['deterministic']):
        session.attempt('deterministic', case.title, repeated, case, session.a)


def kernels_of(case, a, top=12):
    "The kernels that take most of a step: name -> (calls, milliseconds)."
    trainer = trainer_of(case.make(), runtime_of(a.device, case.variant))
    advance(trainer, WARM[case.variant])
    settle(a.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        trainer.train_step()
        settle(a.device)
    end(trainer)
    events = [e for e in recorded.key_averages() if e.device_type == DeviceType.CUDA]
    events = sorted(events, key=lambda e: -e.self_device_time_total)[:top]
    return {e.key[:90]: (e.count, round(e.self_device_time_total / 1e3, 3)) for e in events}


def stage_kernels(session):
    "List the kernels of a step; on CUDA only."
    first, _ = large_kinds(session.large)
    for case in in_variants(first, ['captured']) if session.cuda else ():
        session.attempt('kernels', case.title, kernels_of, case, session.a)


# The machine


def said(*command):
    "What a program prints; '' where it does not exist."
    if not shutil.which(command[0]):
        return ''
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def machine_facts(device):
    "Device, drivers and flags."
    facts = dict(
        cores=os.cpu_count(),
        compiler=shutil.which('gcc') or shutil.which('cc') or 'none',
        matmul_tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn_tf32=torch.backends.cudnn.allow_tf32,
        system=platform.platform(),
    )
    if device.startswith('cuda'):
        facts |= dict(
            memory_gb=round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            smi=said('nvidia-smi', '-L'),
            driver=said('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
        )
    return facts


def stage_machine(session):
    "Note what everything runs on."
    session.attempt('machine', 'provenance', provenance, session.a.device)
    session.attempt('machine', 'device', machine_facts, session.a.device)


# The session


def computes(device):
    "Whether the device still computes, differentiates and draws random numbers."
    try:
        x = torch.randn(64, 64, device=device, requires_grad=True)
        (x @ x).sum().backward()
        return bool(x.grad.isfinite().all())
    except Exception:
        return False


class Session:
    "The report, and the time that is left."

    def __init__(self, a):
        self.a = a
        self.cuda = a.device.startswith('cuda')
        self.began = a.began or time.time()
        self.path = a.out / 'report.json'
        self.report = json.loads(self.path.read_text()) if a.began else {}

    @cached_property
    def large(self):
        "Return the configs of waits and speed."
        return Configs(TINY if self.a.tiny else PAPER, self.a.device)

    def keep(self, stage, name, **facts):
        "Add a fact to the report, and print it."
        self.report.setdefault(stage, {})[name] = facts
        self.path.write_text(json.dumps(self.report, indent=1, default=str) + '\n')
        seconds = time.time() - self.began
        print(f'{seconds:6.1f} s  {stage:8}{name:36}{json.dumps(facts, default=str)}', flush=True)

    def attempt(self, stage, name, measure, *args):
        "Keep what `measure(*args)` returns, or how it fails."
        if name in self.report.get(stage, {}):
            return
        if time.time() - self.began > self.a.minutes * 60:
            self.keep(stage, name, skipped='no time left')
            return
        failure = None
        try:
            self.keep(stage, name, **measure(*args))
        except Exception as e:
            lines = traceback.format_exc().splitlines()
            failure = dict(failed=type(e).__name__, message=str(e)[:800], at=lines[-12:])
        self.clean()
        if failure:
            self.keep(stage, name, **failure)
            if not computes(self.a.device):
                self.go_on_elsewhere()

    def clean(self):
        "Free what a case has left behind."
        try:
            torch.compiler.reset()
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        except Exception as e:  # of a case that failed: `computes` says whether all goes on
            print(f'not all is freed: {e}'[:200], flush=True)

    def go_on_elsewhere(self):
        "Do what is left in a new process, and end as it does."
        print('the device no longer computes here: going on in a new process', flush=True)
        command = [sys.executable, *sys.argv, '--began', str(self.began)]
        sys.exit(subprocess.run(command).returncode)

    def bad(self):
        "Cases that failed or are not fine."
        facts = [(f'{s}: {k}', v) for s, cases in self.report.items() for k, v in cases.items()]
        return [name for name, v in facts if 'failed' in v or v.get('fine') is False]

    def print_table(self):
        "Print all facts, a line each."
        for stage, cases in self.report.items():
            print(f'\n{stage}')
            for name, facts in cases.items():
                short = {k: v for k, v in facts.items() if k != 'at'}
                print(f'  {name:36}', ', '.join(f'{k} {v}' for k, v in short.items())[:400])


def arguments():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, required=True, help='folder of report.json')
    p.add_argument('--device', default='cuda', help='cuda, cuda:1, cpu (default: cuda)')
    p.add_argument(
        '--minutes', type=float, default=5.0, help='after which no case begins (default: 5)'
    )
    p.add_argument('--tiny', action='store_true', help='small networks and few steps')
    p.add_argument(
        '--stages', nargs='+', choices=STAGES, default=STAGES, help='in this order (default: all)'
    )
    p.add_argument(
        '--peak',
        type=float,
        default=790.0,
        help='of the device, TFLOP/s (default: 790, an H100 or H200 in dense bf16)',
    )
    p.add_argument('--began', type=float, default=0.0, help=argparse.SUPPRESS)  # another process
    a = p.parse_args()
    a.device = RuntimeConfig(a.device).device
    a.out.mkdir(parents=True, exist_ok=True)
    return a


def main():
    "Go through the stages."
    a = arguments()
    left = a.minutes * 60 + 120 - (time.time() - a.began if a.began else 0)
    faulthandler.dump_traceback_later(max(left, 60), exit=True)  # a case that hangs
    stages = {name: globals()[f'stage_{name}'] for name in STAGES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ['XCL_HOME'] = home
        session = Session(a)
        for stage in a.stages:
            stages[stage](session)
    session.print_table()
    bad = session.bad()
    print(
        f'\n{time.time() - session.began:.0f} s;', f'bad: {"; ".join(bad)}' if bad else 'all fine'
    )
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
