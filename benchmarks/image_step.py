"""A training step, against a plain PyTorch loop and the loops of two libraries that do the same work.

    python benchmarks/image_step.py --width 16          prints a table
    python benchmarks/image_step.py --lenet --width 8 16 64 --precision fp32 bf16 --out X.json
    python benchmarks/image_step.py --device cuda --width 64 --members 8 --images 0 --precision bf16

ResNet-18 on 32x32 images; with `--lenet` also LeNet on eyes (`gaze_step.py`). *Plain* is what published
code usually does: images from PIL one by one through torchvision's transforms, `DataLoader` without
workers, torchvision's MixUp and CutMix, SGD with its default settings, contiguous layout, teachers as
ordinary modules in a loop under `no_grad`, losses written out. *torchdistill* and *timm* are in
`other_loops.py`. *Ours* is `xcl.trainer.Trainer.train_step`: the code that trains, not a copy of it. Same
images, network, losses, batch and precision on all sides; teachers untrained, since weights do not change
the time of a step; validation and checkpoints left out on all. Before anything is timed, all sides get the
same weights and images and must give the same loss, and plain and ours the same gradients, in double
precision up to the rounding of the teachers' answers. Batches are 128; on a CPU 16 at width 64, and
in bf16 without instructions for it, where the other loops take ten times as long.

KD and XCL-Mix have three rows each. *live*: the teacher is asked at every step. *writes*: so it is, and the
answers are stored, as the first student of a stream does it. *reads*: a later student (another temperature)
reads them and asks nobody. What it reads was written just before, so it comes from memory, not from the disk.

The other loops have a process of their own, with the C library's defaults: a process in which we train keeps
freed memory (`xcl.runtime.keep_freed_memory`), and a plain loop in it would gain by that, too.

Machines drift, so the sides take turns, in blocks of steps; on a CPU with one thread, times are of the
processor, which others on the machine disturb less than the clock's. A time is the median over blocks;
`ratio` (plain to ours), `of_NAME` (NAME to ours) and `of_erm` (ours to our ERM) are medians of the ratios
within one turn, the first with its quartiles. Only ratios of one run should be quoted."""

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gaze_step import Apart, table as lenet_table, timed
from gpu_acceptance import Noise, untrained
from other_loops import INSTALLED, LIBRARIES, endless
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import (
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    ToTensor,
    functional as TF,
    v2,
)

from xcl.files import write_json
from xcl.gaze_data import EyeData
from xcl.images import data_home, image_data
from xcl.likelihoods import Categorical
from xcl.models.cifar import ResNet18
from xcl.nets import net
from xcl.paper.row import likelihood_of
from xcl.paper.rows import CIFAR, RECIPES
from xcl.runs import Run
from xcl.runtime import RuntimeConfig, keep_freed_memory, provenance
from xcl.targets import DTYPES
from xcl.teachers import Ensemble
from xcl.train import Train, trained
from xcl.trainer import Trainer, build
from xcl.transfer import batch_index

_NATIVE_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
WARM = 2  # steps before the first turn


# The plain side


class Images(Dataset):
    "Images as an array, each opened by PIL and transformed by itself."

    def __init__(self, ex, transform):
        self.x, self.y, self.transform = (
            ex.x.permute(0, 2, 3, 1).contiguous().cpu().numpy(),
            ex.y.tolist(),
            transform,
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i])), self.y[i]


class PlainNet(ResNet18):
    "The network on images that are normalised already."

    def normalise(self, x):
        return x


class Plain:
    "The plain loop; `step` is what stands in its body."

    def __init__(self, cfg, loop):
        self.cfg, self.device, r = cfg, torch.device(loop.device), cfg.recipe
        self.net = self.plain_net().train()
        self.teachers = [self.plain_net(trained(Run(t)).state_dict()).eval() for t in cfg.teachers]
        self.opt = torch.optim.SGD(
            self.net.parameters(),
            r.lr,
            momentum=r.momentum,
            weight_decay=r.weight_decay,
            nesterov=True,
        )
        self.as_tensor = Compose([ToTensor(), Normalize(cfg.data.mean, cfg.data.std)])
        crops = RandomCrop(32, 4), RandomHorizontalFlip()
        self.images = Images(loop.train, Compose([*crops, self.as_tensor]))
        mixing = v2.RandomChoice(
            [v2.MixUp(num_classes=cfg.data.classes), v2.CutMix(num_classes=cfg.data.classes)]
        )
        self.collate = (
            (lambda rows: mixing(*default_collate(rows)))
            if not cfg.method.transfer.fixed_images
            else default_collate
        )
        self.batches = endless(
            DataLoader(
                self.images,
                r.batch,
                shuffle=True,
                drop_last=True,
                collate_fn=self.collate,
                pin_memory=self.device.type == 'cuda',
            )
        )

    def plain_net(self, weights=None):
        net = PlainNet(self.cfg.likelihood.n_out, **dict(self.cfg.net.sizes))
        if weights:
            net.load_state_dict(weights)
        return net.to(self.device)

    def amp(self, precision):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == 'bf16')

    def loss(self, x, y):
        with self.amp(self.cfg.precision):
            out = self.net(x)
        if not self.teachers:
            return F.cross_entropy(out.float(), y)
        with torch.no_grad(), self.amp(self.cfg.teacher_precision):
            answer = torch.stack([t(x).float().softmax(-1) for t in self.teachers]).mean(0)
        return F.kl_div(out.float().log_softmax(-1), answer, reduction='batchmean')

    def step(self):
        x, y = (t.to(self.device, non_blocking=True) for t in next(self.batches))
        self.opt.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.opt.step()
        return loss.item()


# Equality first


def check_images(plain, loop):
    "PIL and torchvision crop and mirror as the batched version does, where both draw the same."
    (size, seed), index = (
        (loop.cfg.recipe.batch, loop.cfg.seed),
        batch_index(len(loop.train), loop.cfg.recipe.batch, loop.cfg.seed, 0),
    )
    drawn = loop.train.x[index.to(loop.train.x.device)]
    ours = loop.cfg.data.augment(drawn, seed, 0).float().cpu() / 255
    for x, image, (top, left, mirrored) in zip(
        ours, drawn.cpu(), loop.cfg.data.augment.draw(seed, 0, size).T.tolist()
    ):
        image = TF.crop(
            TF.pad(Image.fromarray(image.permute(1, 2, 0).numpy()), 4), top, left, 32, 32
        )
        image = plain.as_tensor(TF.hflip(image) if mirrored else image)
        torch.testing.assert_close(image, TF.normalize(x, loop.cfg.data.mean, loop.cfg.data.std))


TOLERANCE = {torch.float64: 1e-4, torch.float32: 0.1}


def differ(cfg, runtime, dtype):
    """Largest relative difference of loss and gradients between the two sides, whose students compute in
    `dtype` (our teachers in fp32). Raises AssertionError above TOLERANCE. That of fp32 is wide: on a CPU,
    BatchNorm in channels_last layout has a relative error of 1e-5 (plain summation), and wherever that
    takes an activation across the kink of its ReLU, a gradient jumps by its whole size."""
    loop = Trainer(cfg, Run(cfg, runtime))
    plain, batch = Plain(cfg, loop), loop.batches(0)
    check_images(plain, loop)
    plain.net.load_state_dict(loop.net.state_dict())
    for network in loop.net, plain.net, *plain.teachers:
        network.to(dtype)
    x = batch.inputs[0].to(dtype)
    objective, targets = cfg.method.objective, loop.targets(batch, 0)
    ours = objective.loss(cfg.likelihood, loop.net(x), *targets)
    usual = plain.loss(loop.net.normalise(x), loop.train.y[batch.index])
    for loss in ours, usual:
        loss.backward()
    pairs = [
        (ours.detach(), usual.detach()),
        *((p.grad, q.grad) for p, q in zip(loop.net.parameters(), plain.net.parameters())),
    ]
    check_others(cfg, loop, plain, x, dtype)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert worst < TOLERANCE[dtype], (
        f'{cfg.method.name}, {dtype}: loss or gradients differ by {worst:.1e} of their size'
    )
    return float(f'{worst:.1e}')


def check_others(cfg, loop, plain, x, dtype):
    "The loops of the libraries give the loss of the plain one for the same weights and images."
    images, y = loop.net.normalise(x), loop.train.y[: len(x)]
    soft = F.one_hot(y, cfg.data.classes).to(dtype)
    for name in INSTALLED:
        twin = Plain(cfg, loop)
        twin.net.load_state_dict(loop.net.state_dict())
        side = LIBRARIES[name](twin)
        for network in twin.net, plain.net, *twin.teachers:
            network.to(dtype).train(network is twin.net or network is plain.net)
        if name == 'timm' and twin.teachers:
            side.task.to(dtype)
        given = soft if name == 'timm' and side.mix else y
        found, expected = side.loss(images, given), plain.loss(images, y)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, check_dtype=False)


def check_equal(cfg, runtime):
    "What `differ` finds without TF32, as columns of the table."
    cfg, tf32 = (
        replace(cfg, precision='fp32', teacher_precision='fp32'),
        torch.backends.cudnn.allow_tf32,
    )
    torch.backends.cudnn.allow_tf32 = False
    found = dict(
        differ_fp64=differ(cfg, runtime, torch.float64),
        differ_fp32=differ(cfg, runtime, torch.float32),
    )
    torch.backends.cudnn.allow_tf32 = tf32
    return found


def check_reads(loop):
    "The soft targets of the student's next step are read from the cache."
    calls, outputs = [], Ensemble.member_outputs
    Ensemble.member_outputs = lambda self, *inputs: calls.append(1) or outputs(self, *inputs)
    try:
        loop.train_step()
    finally:
        Ensemble.member_outputs = outputs
    assert not calls, 'the teacher ran, though its soft targets are cached'


# Times


def rows(data, a):
    """(method, variant) -> config; the schedule is as long as what is timed, since a store takes its room at
    once."""
    network = net('resnet18', width=a.width)
    resnet = replace(RECIPES['resnet18'], batch=a.batch)
    per_epoch = (a.images or 50_000) // resnet.batch
    recipe = replace(resnet, epochs=-(-(WARM + a.blocks * a.steps + 1) // per_epoch), milestones=())

    def config(row, recipe, seed, teachers=(), **kw):
        likelihood = likelihood_of(row, Categorical, classes=data.classes)
        return Train(
            network, likelihood, data, row.method, recipe, seed, teachers, a.precision, **kw
        )

    cutmix = CIFAR['CutMix']
    teachers = tuple(config(cutmix, resnet, 1001 + m) for m in range(a.members))

    def of(row, targets='exact'):
        if not row.method.objective.needs_teacher:
            return config(row, recipe, 1)
        return config(row, recipe, 1, teachers, targets=targets, teacher_precision=a.precision)

    for t in teachers:
        untrained(t)
    return {
        ('ERM', 'live'): of(CIFAR['ERM']),
        **{
            (k, v): of(
                CIFAR[k].at(T=5) if v == 'reads' else CIFAR[k],
                'exact' if v == 'live' else a.targets,
            )
            for k in ('KD', 'XCL-Mix')
            for v in ('live', 'writes', 'reads')
        },
    }


def other_steps(cfg, runtime):
    "The plain loop and those of the libraries that are installed."
    loop = Trainer(cfg, Run(cfg, runtime))
    others = {name: LIBRARIES[name](Plain(cfg, loop)).step for name in INSTALLED}
    return dict(plain=Plain(cfg, loop).step, **others)


def measure(configs, erm, a):
    """Times of one method: {'plain' | 'ERM' | variant: list of ms per step}; every turn goes through all of
    them, a writer before its reader."""
    machines = {
        v: RuntimeConfig(a.device, progress=False, target_cache=v in ('writes', 'reads'))
        for v in configs
    }
    loops = {v: Trainer(c, Run(c, machines[v])) for v, c in configs.items()}
    sides = {v: loop.train_step for v, loop in loops.items()}
    if configs['live'] != erm:
        sides = {'ERM': Trainer(erm, Run(erm, machines['live'])).train_step, **sides}
    warm = 1 if a.device == 'cpu' and a.width > 8 else WARM
    with Apart(other_steps, configs['live'], machines['live']) as apart:

        def turn(n):
            there = {k: apart.timed(k, n, a.device) for k in ('plain', *INSTALLED)}
            return {**there, **{k: timed(f, n, a.device) for k, f in sides.items()}}

        turn(warm)
        turns = [turn(a.steps) for _ in range(a.blocks)]
    if 'reads' in loops:
        loops['writes'].train_step()
        check_reads(loops['reads'])
    return {k: [t[k] for t in turns] for k in turns[0]}


def ratio(a, b):
    "Median and quartiles of the turns' ratios."
    return np.quantile(np.array(a) / np.array(b), [0.5, 0.25, 0.75]).round(3).tolist()


def gflop(net, backward):
    "Of one image, in the network's current mode (a multiply-add counts 2)."
    x = torch.zeros(2, 3, 32, 32, device=next(net.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        out = net(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops() / 2 / 1e9


def on_device(cfg, variant, ms, a):
    "Images per second, and the share of the device's peak that the networks' arithmetic makes up."
    net = build(cfg)
    asked = 0 if variant == 'reads' else len(cfg.teachers)
    work = gflop(net.train(), True) + asked * gflop(net.eval().requires_grad_(False), False)
    rate = cfg.recipe.batch / ms * 1e3
    return dict(
        images_per_s=round(rate),
        gflop_per_image=round(work, 3),
        peak_share=round(rate * work / (a.peak * 1e3), 4),
    )


def row(method, variant, c, times, equal, threads, a):
    "One line of the table."
    ms = times[variant]
    r, q1, q3 = ratio(times['plain'], ms)
    medians = {f'{k}_ms': round(float(np.median(times[k])), 2) for k in ('plain', *INSTALLED)}
    return dict(
        network='ResNet-18',
        width=a.width,
        precision=a.precision,
        batch=a.batch,
        method=method,
        targets='' if method == 'ERM' else variant,
        members=len(c.teachers),
        threads=threads,
        **medians,
        ours_ms=round(float(np.median(ms)), 2),
        ratio=r,
        ratio_q1=q1,
        ratio_q3=q3,
        **{f'of_{k}': ratio(times[k], ms)[0] for k in INSTALLED},
        of_erm=ratio(ms, times.get('ERM', times['live']))[0],
        **equal,
        **(on_device(c, variant, float(np.median(ms)), a) if a.device != 'cpu' else {}),
    )


def table(data, threads, a):
    "One line per row of the benchmark, for one width and precision."
    torch.set_num_threads(threads)
    keep_freed_memory()
    out, grid = [], rows(data, a)
    erm = grid['ERM', 'live']
    for method, group in itertools.groupby(grid.items(), lambda o: o[0][0]):
        configs = {variant: c for (_, variant), c in group}
        # double precision is slow, and all widths and precisions run the same code
        small = a.width <= 8 or a.device != 'cpu'
        machine = RuntimeConfig(a.device, progress=False)
        equal = check_equal(configs['live'], machine) if small and a.precision == 'fp32' else {}
        times = measure(configs, erm, a)
        out += [row(method, v, c, times, equal, threads, a) for v, c in configs.items()]
        if a.device != 'cpu':
            torch.compiler.reset()  # the next method's networks are compiled anew
    return out


def cases(a):
    "What to measure: for each width and precision, arguments with its batch and its steps in a block."
    pairs = itertools.product(a.precision, a.width)
    for precision, width in sorted(
        pairs, key=lambda o: (o[1] > 16, o[0] == 'bf16')
    ):  # slow ones last
        batch = 16 if width >= 64 and a.device == 'cpu' else RECIPES['resnet18'].batch
        if a.device == 'cpu' and precision == 'bf16' and not _NATIVE_BF16:
            batch = 16  # the other loops are ten times as slow
        steps = max(1, a.steps * 8 // width) if a.device == 'cpu' else a.steps
        one = dict(width=width, precision=precision, batch=batch, steps=steps)
        if precision == 'fp32' or width in a.bf16_width:
            yield argparse.Namespace(**(vars(a) | one))


def lenets(threads, a):
    "The rows of LeNet, in the columns of the other ones."
    found = lenet_table(EyeData('procedural', split=1, per_person=100), threads, a.blocks, 4)
    head = dict(network='LeNet', precision='fp32', batch=RECIPES['lenet'].batch)
    return [head | r for r in found]


def sizes(classes=100, per_epoch=390):
    "What a store takes at the paper's recipe: one line per kind."
    out = []
    for targets, dtype in DTYPES.items():
        for kept, k in ('mean', 1), ('8 members', 8):
            record = np.dtype(
                [('targets', dtype, (RECIPES['resnet18'].batch, k, classes)), ('checksum', '<u8')]
            ).itemsize
            out.append(
                dict(
                    targets=targets,
                    kept=kept,
                    kb_per_step=round(record / 1e3, 1),
                    steps=RECIPES['resnet18'].epochs * per_epoch,
                    gb_in_all=round(record * RECIPES['resnet18'].epochs * per_epoch / 1e9, 2),
                )
            )
    return out


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        '--width',
        type=int,
        nargs='+',
        default=[16],
        help='of student and teachers; the paper has 64 (default: 16)',
    )
    p.add_argument('--lenet', action='store_true', help='measure LeNet on eyes, too')
    p.add_argument(
        '--bf16-width',
        type=int,
        nargs='+',
        default=[8, 16, 64],
        help='widths that are measured in bf16 (default: 8 16 64)',
    )
    p.add_argument(
        '--members', type=int, default=3, help='of the teacher; the paper has 8 (default: 3)'
    )
    p.add_argument(
        '--images', type=int, default=2000, help='training images; 0: all (default: 2000)'
    )
    p.add_argument('--blocks', type=int, default=5, help='turns of each side (default: 5)')
    p.add_argument(
        '--steps',
        type=int,
        default=4,
        help='steps in a block at width 8, fewer at others (default: 4)',
    )
    p.add_argument(
        '--threads',
        type=int,
        nargs='+',
        default=[1],
        help='measured one after the other (default: 1)',
    )
    p.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1, ... (default: cpu)')
    p.add_argument(
        '--precision',
        choices=('fp32', 'bf16'),
        nargs='+',
        default=['fp32'],
        help='of student and teachers, on both sides (default: fp32)',
    )
    p.add_argument(
        '--targets',
        choices=tuple(DTYPES),
        default='half',
        help='how soft targets are stored (default: half)',
    )
    p.add_argument(
        '--peak',
        type=float,
        default=790.0,
        help='of the device, TFLOP/s; for CUDA only (default: 790, an H200 in dense bf16)',
    )
    p.add_argument(
        '--data-dir',
        default='',
        help='folder of CIFAR-100 (default: that of `xcl.data.data_home`; without it, random pixels)',
    )
    p.add_argument(
        '--out', type=Path, help='.json (with provenance) or .csv to write to (default: print only)'
    )
    a = p.parse_args()
    if a.out and a.out.suffix not in ('.json', '.csv'):
        p.error(f'--out is {a.out}; allowed: a name that ends in .json or .csv')
    for k in 'width', 'members', 'blocks', 'steps':
        if np.min(getattr(a, k)) < 1:
            p.error(f'--{k} is {getattr(a, k)}; allowed: 1 or more')
    if a.images and a.images < RECIPES['resnet18'].batch:
        p.error(
            f'--images is {a.images}; allowed: {RECIPES["resnet18"].batch} or more, or 0 for all'
        )
    a.device = RuntimeConfig(a.device).device
    here = data_home()
    a.data_dir = a.data_dir or (
        str(here / 'cifar100') if here and (here / 'cifar100').is_dir() else ''
    )
    return a


def main():
    a = arguments()
    data = (
        image_data('cifar100', a.data_dir, train_size=a.images)
        if a.data_dir
        else Noise(a.images or 50_000)
    )  # decoded before the home moves
    asked = {k: getattr(a, k) for k in ('images', 'blocks', 'steps', 'targets')}
    made = dict(
        provenance(a.device),
        data='CIFAR-100' if a.data_dir else 'random pixels',
        cores=os.cpu_count(),
        load_1min=round(os.getloadavg()[0], 2),
        native_bf16=_NATIVE_BF16,
        libraries={name: version(name) for name in INSTALLED},
        **asked,
        **(dict(peak_tflops=a.peak) if a.device != 'cpu' else {}),
    )
    made.pop('threads')  # a column
    found = []
    for threads in a.threads:
        with tempfile.TemporaryDirectory() as home:
            os.environ['XCL_HOME'] = home
            for part in parts(data, threads, a):
                found += part
                print(pd.DataFrame(part).to_string(index=False), flush=True)
                write(found, made, a.out)
    print(json.dumps(made), "\n\nA store at the paper's recipe (A.2):", sep='')
    print(pd.DataFrame(sizes()).to_string(index=False))


def parts(data, threads, a):
    "The rows of LeNet, then those of each width and precision, as they are measured."
    if a.lenet:
        yield lenets(threads, a)
    for case in cases(a):
        yield table(data, threads, case)


def write(found, made, out):
    "Write what has been measured so far."
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == '.csv':
        pd.DataFrame(found).assign(**made).to_csv(out, index=False)
    else:
        write_json(out, dict(rows=found, store=sizes(), made_by=made))


if __name__ == '__main__':
    main()
