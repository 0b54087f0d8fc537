"""A ResNet-18 training step on 32x32 images, against a plain PyTorch loop that does the same work.

    python benchmarks/image_step.py                     prints two tables; about two minutes on a quiet CPU
    python benchmarks/image_step.py --out outputs/benchmarks/image_step.json
    python benchmarks/image_step.py --device cuda --width 64 --members 8 --images 0 --precision bf16

*Plain* is what published code usually does: images from PIL one by one through torchvision's transforms,
`DataLoader` without workers, torchvision's MixUp and CutMix, SGD with its default settings, contiguous
layout, teachers as ordinary modules in a loop under `no_grad`, losses written out. *Ours* is
`xcl.trainer.Trainer.train_step`: the code that trains, not a copy of it. Same images, network, losses, batch
and precision on both sides; teachers untrained, since weights do not change the time of a step; validation
and checkpoints left out on both. Before anything is timed, both sides get the same weights and images and
must give the same loss and gradients, in double precision up to the rounding of the teachers' answers.

KD and XCL-Mix have three rows each. *live*: the teacher is asked at every step. *writes*: so it is, and the
answers are stored, as the first student of a stream does it. *reads*: a later student (another temperature)
reads them and asks nobody. What it reads was written just before, so it comes from memory, not from the disk.

Machines drift, so the sides take turns, in blocks of steps. A time is the median over blocks; `ratio` (plain
to ours) and `of_erm` (ours to our ERM) are medians of the ratios within one turn, the first with its
quartiles. Only ratios of one run should be quoted."""

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gpu_acceptance import Noise, untrained
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

from xcl.images import data_home, image_data
from xcl.likelihoods import Categorical
from xcl.models.cifar import ResNet18
from xcl.nets import net
from xcl.paper.row import likelihood_of
from xcl.paper.rows import CIFAR, RECIPES
from xcl.runs import Run
from xcl.runtime import RuntimeConfig, provenance
from xcl.targets import DTYPES
from xcl.teachers import Ensemble
from xcl.train import Train, trained
from xcl.trainer import Trainer, build
from xcl.transfer import batch_index

WARM = 4  # steps before the first turn


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


def endless(loader):
    while True:
        yield from loader


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
        images = Images(
            loop.train, Compose([RandomCrop(32, 4), RandomHorizontalFlip(), self.as_tensor])
        )
        mixing = v2.RandomChoice(
            [v2.MixUp(num_classes=cfg.data.classes), v2.CutMix(num_classes=cfg.data.classes)]
        )
        collate = (
            (lambda rows: mixing(*default_collate(rows)))
            if not cfg.method.transfer.fixed_images
            else default_collate
        )
        self.batches = endless(
            DataLoader(
                images,
                r.batch,
                shuffle=True,
                drop_last=True,
                collate_fn=collate,
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
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert worst < TOLERANCE[dtype], (
        f'{cfg.method.name}, {dtype}: loss or gradients differ by {worst:.1e} of their size'
    )
    return float(f'{worst:.1e}')


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
    network, resnet = net('resnet18', width=a.width), RECIPES['resnet18']
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


def timed(f, n, device):
    "Milliseconds per call, over n calls."

    def settle():
        return torch.cuda.synchronize() if device.startswith('cuda') else None

    settle()
    t = time.perf_counter()
    for _ in range(n):
        f()
    settle()
    return 1e3 * (time.perf_counter() - t) / n


def measure(configs, erm, a):
    """Times of one method: {'plain' | 'ERM' | variant: list of ms per step}; every turn goes through all of
    them, a writer before its reader."""
    machines = {
        v: RuntimeConfig(a.device, progress=False, target_cache=v in ('writes', 'reads'))
        for v in configs
    }
    loops = {v: Trainer(c, Run(c, machines[v])) for v, c in configs.items()}
    plain = Plain(configs['live'], loops['live'])
    sides = {
        'plain': plain.step,
        **(
            {}
            if configs['live'] == erm
            else {'ERM': Trainer(erm, Run(erm, machines['live'])).train_step}
        ),
        **{v: loop.train_step for v, loop in loops.items()},
    }
    for f in sides.values():
        timed(f, WARM, a.device)
    turns = [{k: timed(f, a.steps, a.device) for k, f in sides.items()} for _ in range(a.blocks)]
    if 'reads' in loops:
        loops['writes'].train_step()
        check_reads(loops['reads'])
    return {k: [t[k] for t in turns] for k in sides}


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


def table(data, threads, a):
    "One line per row of the benchmark."
    torch.set_num_threads(threads)
    out, grid = [], rows(data, a)
    erm = grid['ERM', 'live']
    for method, group in itertools.groupby(grid.items(), lambda o: o[0][0]):
        configs = {variant: c for (_, variant), c in group}
        equal = check_equal(configs['live'], RuntimeConfig(a.device, progress=False))
        times = measure(configs, erm, a)
        for variant, c in configs.items():
            ms, (r, q1, q3) = (
                float(np.median(times[variant])),
                ratio(times['plain'], times[variant]),
            )
            out.append(
                dict(
                    method=method,
                    targets='' if method == 'ERM' else variant,
                    members=len(c.teachers),
                    threads=threads,
                    plain_ms=round(float(np.median(times['plain'])), 2),
                    ours_ms=round(ms, 2),
                    ratio=r,
                    ratio_q1=q1,
                    ratio_q3=q3,
                    of_erm=ratio(times[variant], times.get('ERM', times['live']))[0],
                    **equal,
                    **(on_device(c, variant, ms, a) if a.device.startswith('cuda') else {}),
                )
            )
        if a.device.startswith('cuda'):
            torch.compiler.reset()  # the next method's networks are compiled anew
    return out


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
        default=16,
        help='of student and teachers; the paper has 64 (default: 16)',
    )
    p.add_argument(
        '--members', type=int, default=3, help='of the teacher; the paper has 8 (default: 3)'
    )
    p.add_argument(
        '--images', type=int, default=2000, help='training images; 0: all (default: 2000)'
    )
    p.add_argument('--blocks', type=int, default=5, help='turns of each side (default: 5)')
    p.add_argument('--steps', type=int, default=3, help='steps in a block (default: 3)')
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
        default='fp32',
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
        if getattr(a, k) < 1:
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
    frames = []
    for threads in a.threads:
        with tempfile.TemporaryDirectory() as home:
            os.environ['XCL_HOME'] = home
            frames += table(data, threads, a)
    frame, store = pd.DataFrame(frames), pd.DataFrame(sizes())
    asked = {
        k: getattr(a, k) for k in ('width', 'images', 'blocks', 'steps', 'precision', 'targets')
    }
    made = dict(
        provenance(a.device),
        data='CIFAR-100' if a.data_dir else 'random pixels',
        cores=os.cpu_count(),
        load_1min=round(os.getloadavg()[0], 2),
        batch=RECIPES['resnet18'].batch,
        **asked,
        **(dict(peak_tflops=a.peak) if a.device.startswith('cuda') else {}),
    )
    made.pop('threads')  # a column
    print(
        frame.to_string(index=False),
        "\n\nA store at the paper's recipe (A.2):\n",
        store.to_string(index=False),
        '\n\n',
        json.dumps(made),
        sep='',
    )
    if not a.out:
        return
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if a.out.suffix == '.csv':
        frame.assign(**made).to_csv(a.out, index=False)
    else:
        a.out.write_text(
            json.dumps(
                dict(rows=frame.to_dict('records'), store=store.to_dict('records'), made_by=made),
                indent=1,
            )
            + '\n'
        )


if __name__ == '__main__':
    main()
