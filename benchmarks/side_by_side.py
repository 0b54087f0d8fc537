"""How much sooner several runs are finished when they are made side by side.

    python benchmarks/side_by_side.py --out outputs/benchmarks/side_by_side.json

The same runs, one thread each, by one worker process and by two (`xcl.grid`, as `parallel = 2` in a notebook
and `--workers 2` of `xcl.launch`). Wall time from the first run's start to the last one's end; a run that
takes no time starts the processes before."""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'

from xcl.files import write_json
from xcl.gaze_data import eye_data
from xcl.grid import make_all
from xcl.images import image_data
from xcl.likelihoods import Categorical, Gaussian
from xcl.nets import net
from xcl.plan import write_plan
from xcl.recipe import Recipe
from xcl.runtime import RuntimeConfig, provenance
from xcl.train import METHODS, Train

RUNS = 4
DIGITS = image_data('digits', train_size=128, test_size=100)
EYES = eye_data('procedural', '', split=1, people=4, per_person=64, held_out=1)
KINDS = {
    'ResNet-18, width 16, ERM': (net('resnet18', width=16), Categorical(10), DIGITS, 128),
    'LeNet, ERM': (net('lenet'), Gaussian(2), EYES, 32),
}  # network, likelihood, data, batch


def config(kind: str, seed: int, steps: int) -> Train:
    "Return a run of so many steps; one validation at its end."
    network, likelihood, data, batch = KINDS[kind]
    images = len(data.load(RuntimeConfig('cpu'))[0])
    epochs = max(1, steps // (images // batch))
    recipe = Recipe('adam', 1e-4, batch, epochs)
    return Train(network, likelihood, data, METHODS['ERM'], recipe, seed, val_every=epochs)


def seconds(configs: list, workers: int, warm: list) -> float:
    "Return the wall time of runs, made in a fresh home by warm worker processes."
    ends = []

    def say(line: str) -> None:
        if 'finished' in line:
            ends.append(time.perf_counter())

    runtime = RuntimeConfig('cpu', progress=False)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['XCL_HOME'] = folder
        plan = Path(folder) / 'plan.json'
        write_plan(plan, warm[:workers] + configs)
        errors = make_all(plan, warm[:workers] + configs, runtime, workers, say=say)
    assert not errors, errors
    return ends[-1] - ends[workers - 1]


def main() -> None:
    "Time one worker and two, in turns; write the medians."
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--out', type=Path)
    ask.add_argument('--steps', type=int, default=400)
    ask.add_argument('--turns', type=int, default=3)
    given = ask.parse_args()
    found = {}
    for kind in KINDS:
        configs = [config(kind, seed, given.steps) for seed in range(RUNS)]
        warm = [config(kind, 1000 + k, 1) for k in range(2)]
        times = {1: [], 2: []}
        for _ in range(given.turns):
            for workers, mine in times.items():
                mine.append(seconds(configs, workers, warm))
        one, two = (sorted(v)[len(v) // 2] for v in times.values())
        found[kind] = dict(one=one, two=two, speedup=one / two, all=times)
        print(kind, f'{one:.1f} s one after the other, {two:.1f} s two at a time: {one / two:.2f}')
    if given.out:
        write_json(given.out, dict(made_by=provenance(), steps=given.steps, runs=RUNS, kinds=found))


if __name__ == '__main__':
    main()
