"""A LeNet training step on eyes, against a plain PyTorch loop that does the same work.

    python benchmarks/gaze_step.py                      prints a table; about two minutes on a quiet CPU
    python benchmarks/gaze_step.py --threads 1 2 --out outputs/benchmarks/gaze_step.json

*Plain* is what published code usually does: a `Dataset` that converts image by image, `DataLoader` with
default collate and shuffling, Adam with its default settings, contiguous layout, teachers as ordinary modules
under `no_grad`, mixing written out. *Ours* is `xcl.trainer.Trainer.train_step`: the code that trains, not a
copy of it. Same data, networks, losses, batch and recipe on both sides, teachers untrained, since weights do
not change the time of a step; validation and checkpoints left out on both.

KD is where the work differs on purpose: a plain loop runs the teacher at every step, ours reads soft targets
that were computed once before the loop. So KD has a second row, which adds the time of computing them, spread
over all steps.

The plain loop has a process of its own, with the C library's defaults: a process in which we train keeps
freed memory (`xcl.runtime.keep_freed_memory`), and a plain loop in it would gain by that, too.

Machines drift, so the two sides take turns, in blocks of steps. A time is the median over blocks; a ratio is
the median of the ratios of neighbouring blocks, given with its quartiles. Only ratios of one run should be
quoted."""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gpu_acceptance import settle, untrained
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from xcl.gaze_data import EyeData
from xcl.likelihoods import Gaussian
from xcl.nets import build_net, net
from xcl.paper.rows import GAZE, RECIPES
from xcl.runs import Run, ensure
from xcl.runtime import (
    RuntimeConfig,
    keep_freed_memory,
    provenance,
    register_path,
    registered_paths,
)
from xcl.teachers import Ensemble, predict
from xcl.train import METHODS, Train, trained
from xcl.trainer import Trainer

AIM = 2.0  # times as fast as the plain loop


class Eyes(Dataset):
    "Eyes as NumPy arrays, converted one by one."

    def __init__(self, ex):
        self.x, self.pose, self.y = ex.x.permute(0, 2, 3, 1).numpy(), ex.aux.numpy(), ex.y.numpy()
        self.convert = ToTensor()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.convert(self.x[i]), torch.from_numpy(self.pose[i]), torch.from_numpy(self.y[i])


def mixup(x, pose, alpha=1.0):
    "MixUp of a batch as it is usually written."
    lam, other = np.random.beta(alpha, alpha), torch.randperm(len(x))
    return lam * x + (1 - lam) * x[other], lam * pose + (1 - lam) * pose[other]


def endless(loader):
    while True:
        yield from loader


class Plain:
    "The plain loop; `step` is what stands in its body."

    def __init__(self, cfg, train, runtime):
        self.cfg, self.likelihood = cfg, cfg.likelihood
        self.net = build_net(cfg.net, cfg.likelihood.n_out).train()
        self.teachers = [self.as_usual(ensure(t, runtime)) for t in cfg.teachers]
        self.opt = torch.optim.Adam(
            self.net.parameters(), cfg.recipe.lr, weight_decay=cfg.recipe.weight_decay
        )
        self.batches = endless(
            DataLoader(Eyes(train), cfg.recipe.batch, shuffle=True, drop_last=True)
        )

    def as_usual(self, run):
        teacher = build_net(run.cfg.net, run.cfg.likelihood.n_out)
        teacher.load_state_dict(run.tensors())
        return teacher.eval()

    def step(self):
        x, pose, y = next(self.batches)
        if self.cfg.method.name == 'XCL-Mix':
            x, pose = mixup(x, pose)
        self.opt.zero_grad()
        out = self.net(x, pose)
        if self.teachers:
            with torch.no_grad():
                answer = self.likelihood.combine(torch.stack([t(x, pose) for t in self.teachers]))
            loss = self.likelihood.kl(out, answer)
        else:
            loss = self.likelihood.nll(out, y)
        loss.backward()
        self.opt.step()
        return loss.item()


def rows(data):
    "(method, members) -> config, at the paper's recipe."
    recipe, erm = RECIPES['preact_resnet'], METHODS['ERM']
    parts = net('preact_resnet'), Gaussian(), data, erm, recipe
    members = [untrained(Train(*parts, s)) for s in range(8)]

    def student(row, m):
        teachers = tuple(members[:m])
        method = GAZE[row].method
        return Train(net('lenet'), Gaussian(), data, method, RECIPES['lenet'], 1, teachers)

    names = [('ERM', 0), *((k, m) for k in ('KD', 'XCL-Mix') for m in (1, 8))]
    return {name: student(*name) for name in names}


def timed(f, n=1, device='cpu'):
    "Milliseconds per call, over n calls: of the processor where one thread works, else of the clock."
    alone = device == 'cpu' and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    settle(device)
    t = clock()
    for _ in range(n):
        f()
    settle(device)
    return 1e3 * (clock() - t) / n


class Apart:
    "Loops in a process of their own, where `steps_of(*args)` makes them: name -> function of one step."

    def __init__(self, steps_of, *args):
        given = steps_of, torch.get_num_threads(), registered_paths(), *args
        self.process = ProcessPoolExecutor(1, get_context('spawn'), self._open, given)

    @classmethod
    def _open(cls, steps_of, threads, paths, *args):
        torch.set_num_threads(threads)
        for digest, path in paths.items():
            register_path(digest, path)
        cls.steps = steps_of(*args)

    @classmethod
    def _timed(cls, name, n, device):
        return timed(cls.steps[name], n, device)

    def timed(self, name, n, device='cpu'):
        "As `timed`, of the loop of that name."
        return self.process.submit(self._timed, name, n, device).result()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.shutdown()


def ratio(plain, ours):
    "Median and quartiles of the blocks' ratios."
    q = np.quantile(np.array(plain) / np.array(ours), [0.5, 0.25, 0.75])
    return dict(zip(('ratio', 'ratio_q1', 'ratio_q3'), q.round(2).tolist()))


def plain_steps(cfg, runtime):
    "The loops that `Apart` opens: the plain one."
    return dict(plain=Plain(cfg, cfg.data.load(runtime)[0], runtime).step)


def measure(cfg, runtime, blocks, steps):
    """Times of one row, both sides in turns: plain and ours as lists of ms per step, and the filling of
    answers, ms per step of the recipe."""
    loop = Trainer(cfg, Run(cfg, runtime))
    fill = 0.0
    if cfg.method.name == 'KD':
        teacher = Ensemble([trained(ensure(t, runtime)) for t in cfg.teachers], cfg.likelihood)
        fill = timed(lambda: predict(teacher, loop.train)) / loop.steps
    with Apart(plain_steps, cfg, runtime) as plain:
        plain.timed('plain', 5)
        timed(loop.train_step, 5)
        times = [
            (plain.timed('plain', steps), timed(loop.train_step, steps)) for _ in range(blocks)
        ]
    return *map(list, zip(*times)), fill


def table(data, threads, blocks, steps):
    "One line per row of the benchmark."
    torch.set_num_threads(threads)
    keep_freed_memory()
    runtime, out = RuntimeConfig('cpu', progress=False), []
    for (method, members), cfg in rows(data).items():
        plain, ours, fill = measure(cfg, runtime, blocks, steps)
        for name, extra in ((method, 0.0), *([('KD, filling included', fill)] if fill else ())):
            out.append(
                dict(
                    method=name,
                    members=members,
                    threads=threads,
                    plain_ms=round(float(np.median(plain)), 2),
                    ours_ms=round(float(np.median(ours)) + extra, 2),
                    **ratio(plain, [t + extra for t in ours]),
                )
            )
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        '--threads',
        type=int,
        nargs='+',
        default=[1],
        help='measured one after the other (default: 1)',
    )
    p.add_argument('--blocks', type=int, default=9, help='turns of each side (default: 9)')
    p.add_argument('--steps', type=int, default=10, help='steps in a block (default: 10)')
    p.add_argument(
        '--per-person',
        type=int,
        default=500,
        help='eyes of each of 15 procedural people (default: 500)',
    )
    p.add_argument(
        '--out', type=Path, help='.json (with provenance) or .csv to write to (default: print only)'
    )
    a = p.parse_args()
    if a.out and a.out.suffix not in ('.json', '.csv'):
        p.error(f'--out is {a.out}; allowed: a name that ends in .json or .csv')
    data = EyeData('procedural', split=1, per_person=a.per_person)
    with tempfile.TemporaryDirectory() as home:
        os.environ['XCL_HOME'] = home
        frame = pd.DataFrame([row for t in a.threads for row in table(data, t, a.blocks, a.steps)])
    made = dict(
        provenance(),
        cores=os.cpu_count(),
        load_1min=round(os.getloadavg()[0], 2),
        batch=RECIPES['lenet'].batch,
        blocks=a.blocks,
        steps=a.steps,
    )
    made.pop('threads')  # a column
    print(frame.to_string(index=False), '\n\n', json.dumps(made), sep='')
    short = frame[frame.ratio < AIM]
    print(
        f'aim: {AIM:g} times as fast as plain;',
        'met by all rows'
        if short.empty
        else 'not met by: '
        + '; '.join(
            f'{r.method} with {r.members} members, {r.threads} threads: {r.ratio:.2f}'
            for r in short.itertuples()
        ),
    )
    if not a.out:
        return
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if a.out.suffix == '.csv':
        frame.assign(**made).to_csv(a.out, index=False)
    else:
        a.out.write_text(
            json.dumps(dict(rows=frame.to_dict('records'), made_by=made), indent=1) + '\n'
        )


if __name__ == '__main__':
    main()
