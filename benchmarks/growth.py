"""How the cost of a step grows with the number of images and of teachers, on one CPU thread.

    python benchmarks/growth.py --out outputs/benchmarks/growth.json      also writes growth.png beside it

ResNet-18 of width 8, batch 128, random pixels, untrained teachers; `Trainer.train_step` alone, processor
time, medians over blocks. *live*: the teachers are asked at every step; *stored*: answers are read, as a
second student of the stream does."""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from gaze_step import timed
from gpu_acceptance import Noise, untrained

from xcl.files import write_json
from xcl.likelihoods import Categorical
from xcl.nets import net
from xcl.paper.palette import COLOURS
from xcl.paper.row import likelihood_of
from xcl.paper.rows import CIFAR, RECIPES
from xcl.runs import Run
from xcl.runtime import RuntimeConfig, provenance
from xcl.train import Train
from xcl.trainer import Trainer

IMAGES = 1000, 2000, 5000, 10_000, 20_000, 50_000
MEMBERS = 1, 2, 4, 8
FEW, MANY = 2000, 3  # images where members vary, members where images do
KINDS = ('ERM', 'live'), ('KD', 'live'), ('XCL-Mix', 'live'), ('XCL-Mix', 'stored')


def config(row, images, members, steps):
    "A student; the schedule is as long as what is timed, since a store takes its room at once."
    recipe = replace(RECIPES['resnet18'], epochs=-(-steps // (images // 128)), milestones=())
    data, network = Noise(images), net('resnet18', width=8)

    def train(row, seed, teachers=()):
        likelihood = likelihood_of(row, Categorical, classes=data.classes)
        return Train(network, likelihood, data, row.method, recipe, seed, teachers, targets='half')

    taught = row.method.objective.needs_teacher
    seeds = range(1001, 1001 + members) if taught else ()
    return train(row, 1, tuple(untrained(train(CIFAR['CutMix'], k)) for k in seeds))


def loops_of(kind, images, members, steps):
    "The trainers of one point, the last of which is timed, and the seconds that making one took."
    method, targets = kind
    runtime = RuntimeConfig('cpu', progress=False, target_cache=targets == 'stored')
    row = CIFAR[method]
    rows = [row, row.at(T=5)] if targets == 'stored' else [row]
    configs = [config(r, images, members, steps) for r in rows]
    t = time.process_time()
    loops = [Trainer(c, Run(c, runtime)) for c in configs]
    return loops, (time.process_time() - t) / len(loops)


def points(kind):
    "(images, members) of one line of the figure."
    by_images = [(n, MANY) for n in IMAGES]
    return by_images + [(FEW, m) for m in MEMBERS if kind[0] != 'ERM' and m != MANY]


def measure(blocks, steps):
    "One row for each point."
    found = []
    where = [(kind, n, m) for kind in KINDS for n, m in points(kind) if (n, m) != (FEW, MANY)]
    where += [(kind, FEW, MANY) for kind in KINDS]
    for kind, images, members in where:
        loops, ready_s = loops_of(kind, images, members, blocks * steps + 2)
        ms = []
        for block in range(blocks + 1):  # the first is not counted
            each = [timed(loop.train_step, steps if block else 1) for loop in loops]
            ms.append(each[-1])
        row = dict(method=kind[0], targets=kind[1], images=images)
        row |= dict(
            members=members if kind[0] != 'ERM' else 0, ms=round(float(np.median(ms[1:])), 1)
        )
        found.append(row | dict(ready_s=round(ready_s, 2)))
        print(json.dumps(found[-1]), flush=True)
    return found


STYLE = {
    ('ERM', 'live'): dict(color=COLOURS['ERM'], marker='o', label='ERM'),
    ('KD', 'live'): dict(color=COLOURS['KD'], marker='s', label='KD, live'),
    ('XCL-Mix', 'live'): dict(color=COLOURS['XCL'], marker='^', label='XCL-Mix, live'),
    ('XCL-Mix', 'stored'): dict(
        color=COLOURS['XCL'], marker='v', linestyle='--', label='XCL-Mix, stored'
    ),
}


def figure(found, path):
    "Milliseconds a step over images, and over members."
    frame = pd.DataFrame(found)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout='constrained')
    for kind, style in STYLE.items():
        rows = frame[(frame.method == kind[0]) & (frame.targets == kind[1])]
        by_images = rows[rows.members.isin((0, MANY))].sort_values('images')
        left.plot(by_images.images, by_images.ms, **style)
        by_members = rows[rows.images == FEW].sort_values('members')
        if kind[0] == 'ERM':
            right.axhline(by_members.ms.item(), color=style['color'])
        else:
            right.plot(by_members.members, by_members.ms, **style)
    left.set(
        xscale='log', xlabel=f'training images ({MANY} teachers)', ylabel='ms a step (processor)'
    )
    right.set(xlabel=f'teachers ({FEW:,} images)', xticks=sorted({*MEMBERS, MANY}))
    left.set_xticks(IMAGES, [f'{n // 1000}k' for n in IMAGES])
    left.minorticks_off()
    left.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside upper center', ncols=4, frameon=False)
    fig.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--blocks', type=int, default=3, help='of steps, for each point (default: 3)')
    p.add_argument('--steps', type=int, default=2, help='in a block (default: 2)')
    p.add_argument('--out', type=Path, help='.json to write to (default: print only)')
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ['XCL_HOME'] = home
        found = measure(a.blocks, a.steps)
    if a.out:
        by = dict(provenance(), batch=128, width=8, blocks=a.blocks, steps=a.steps)
        write_json(a.out, dict(rows=found, made_by=by))
        figure(found, a.out.with_suffix('.png'))


if __name__ == '__main__':
    main()
