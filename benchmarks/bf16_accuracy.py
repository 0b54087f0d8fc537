"""What bf16 does to accuracy: the same students in fp32 and in bf16, paired by seed.

    python benchmarks/bf16_accuracy.py --out outputs/benchmarks/bf16_accuracy.json

scikit-learn's digits, 512 training images of 8x8 pixels; ResNet-18, a short recipe; ERM, and XCL-Mix of one
CutMix teacher that was trained in fp32. In bf16 the student's and the teacher's forward passes are under
autocast; a CPU without instructions for it computes products in fp32 and rounds them
(`xcl.runtime.bf16_products`)."""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from xcl.files import write_json
from xcl.images import image_data
from xcl.likelihoods import Categorical
from xcl.nets import net
from xcl.paper.rows import RECIPES
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig, provenance
from xcl.train import METHODS, Train


def runs(methods, seeds, epochs, width):
    "(method, precision, seed) -> config."
    data = image_data('digits', train_size=512)
    recipe = replace(
        RECIPES['resnet18'], lr=0.05, batch=64, epochs=epochs, milestones=(epochs * 3 // 4,)
    )
    parts = net('resnet18', width=width), Categorical(10), data
    teacher = Train(*parts, METHODS['CutMix'], recipe, 1001, val_every=epochs)
    out = {}
    for method in methods:
        for precision in 'fp32', 'bf16':
            for seed in range(1, seeds + 1):
                more = dict(precision=precision, val_every=epochs)
                if method == 'XCL-Mix':
                    more |= dict(teachers=(teacher,), teacher_precision=precision)
                out[method, precision, seed] = Train(*parts, METHODS[method], recipe, seed, **more)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--methods', nargs='+', choices=('ERM', 'XCL-Mix'), default=['ERM', 'XCL-Mix'])
    p.add_argument('--seeds', type=int, default=3, help='1 to this one (default: 3)')
    p.add_argument('--epochs', type=int, default=16, help='of a run (default: 16)')
    p.add_argument('--width', type=int, default=8, help='of the networks (default: 8)')
    p.add_argument('--out', type=Path, help='.json to write to (default: print only)')
    a = p.parse_args()
    made, runtime = [], RuntimeConfig('cpu', progress=False)
    with tempfile.TemporaryDirectory() as home:
        os.environ['XCL_HOME'] = home
        for (method, precision, seed), cfg in runs(a.methods, a.seeds, a.epochs, a.width).items():
            run = ensure(cfg, runtime)
            made.append(dict(method=method, precision=precision, seed=seed, **run.result))
            made[-1] |= dict(cpu_s=run.provenance['cpu_s'])
            print(json.dumps(made[-1]), flush=True)
    frame = pd.DataFrame(made)
    wide = frame.pivot(index=['method', 'seed'], columns='precision', values='top1')
    change = (wide.bf16 - wide.fp32).groupby('method').agg(['mean', 'std'])
    print(change.to_string())
    by = dict(
        provenance(),
        native_bf16=torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        epochs=a.epochs,
        width=a.width,
    )
    if a.out:
        write_json(a.out, dict(rows=made, change=change.to_dict('index'), made_by=by))


if __name__ == '__main__':
    main()
