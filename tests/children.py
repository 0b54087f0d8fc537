"""Real processes that train, for tests that kill them.

A fork server has imported PyTorch once, so that a child is up at once and can be killed often.
"""

import gc
import multiprocessing
import os
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
import torch

from xcl.data import CropFlip
from xcl.images import image_data
from xcl.likelihoods import Categorical
from xcl.nets import net
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig
from xcl.train import METHODS, Method, Train
from xcl.trainer import Trainer
from xcl.transfer import CutMix, Empirical, RandomChoice

SERVER = multiprocessing.get_context('forkserver')
# torch._dynamo: 900 modules that a first optimiser imports; then what notebooks import
SERVER.set_forkserver_preload(
    [
        'xcl.train',
        'xcl.eye_renderer',
        'torch._dynamo',
        'xcl.paper.gaze',
        'papermill',
        'execnb.shell',
        'children',  # this module, which each child imports
    ]
)
gc.freeze()  # so that no child visits, and thereby copies, what was imported before it was forked
# files that may differ between two runs of one config
OF_THE_MACHINE = 'provenance.json', 'holder.json', 'lock'
# CutMix as on CIFAR: half of the batches are cut
HALF_CUT = Method('CutMix', RandomChoice(CutMix(), Empirical()), METHODS['CutMix'].objective)


def digit_net(
    data, method, recipe, seed, teachers=(), width=4, T=1.0, name='resnet18', classes=10, **kw
):
    "A ResNet-18, with full-precision or binary weights."
    likelihood = Categorical(classes, T, scale_t2=T != 1)
    network = net(name, width=width)
    return Train(network, likelihood, data, method, recipe, seed, teachers, **kw)


def taught_digits(home, recipe, members):
    "A home with decoded digits and teachers trained for one epoch of `recipe`; data and teachers."
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('XCL_HOME', str(home))
        data = image_data('digits', train_size=128, val_fraction=0.1, augment=CropFlip(2, True))
        one = replace(recipe, epochs=1, milestones=())
        teachers = tuple(digit_net(data, HALF_CUT, one, m) for m in range(members))
        for t in teachers:
            ensure(t, RuntimeConfig('cpu', progress=False, checkpoint_s=1e9))
    return SimpleNamespace(home=home, data=data, members=teachers)


def watch(trainer, pace=0.0, more=lambda self: ''):
    "Let a class of trainers print from which step it continues (and `more`), and wait after each step."
    begin, step = trainer.__init__, trainer.train_step

    def loud(self, cfg, run):
        begin(self, cfg, run)
        print(f'{run.folder.name} from step {self.step}{more(self)}')

    def slow(self):
        step(self)
        time.sleep(pace)

    trainer.__init__, trainer.train_step = loud, slow


def work(cfg, home, log, hook=None, checkpoint_s=0.05, pace=0.0, cache=False):
    """What a child does: ask for a run, and write to `log` what it prints and each training that it begins or
    takes up. `pace`: rest after each step."""
    os.environ['XCL_HOME'] = str(home)
    torch.set_num_threads(1)
    sys.stdout = open(log, 'a', buffering=1)
    if hook:
        hook[0](*hook[1:])
    watch(Trainer, pace)
    ensure(cfg, RuntimeConfig('cpu', progress=False, checkpoint_s=checkpoint_s, target_cache=cache))


def start(*args, **kw):
    child = SERVER.Process(target=work, args=args, kwargs=kw, daemon=True)
    child.start()
    return child


def make(*args, **kw):
    "Exit code of a child that nobody disturbs."
    child = start(*args, **kw)
    child.join(600)
    return child.exitcode


def _notebook(path, out, home, params):
    "What a child does: execute a notebook with parameters, and write it with its outputs."
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    os.environ['XCL_HOME'] = str(home)
    os.chdir(out.parent)
    out.write_text(nbformat.writes(parameterize_notebook(load_notebook_node(str(path)), params)))
    CaptureShell(mpl_format='png').execute(out, out)


def execute(path, out, home, **params):
    "The notebook as executed in a process that has imported PyTorch already; fails where a cell does."
    child = SERVER.Process(target=_notebook, args=(path, out, home, params))
    child.start()
    child.join(600)
    child.kill()  # where it hangs
    assert child.exitcode == 0, f'{path.name}: exit code {child.exitcode}'
    page = nbformat.read(out, as_version=4)
    outputs = [o for c in page.cells if c.cell_type == 'code' for o in c.outputs]
    assert not (errors := [o.evalue for o in outputs if o.output_type == 'error']), errors
    return page


def undisturbed(tmp_path_factory, cfg, hook=None):
    "Records of a config, made in a home of its own by a child that is left alone."
    home = tmp_path_factory.mktemp('undisturbed')
    assert make(cfg, home, home.with_suffix('.log'), hook, checkpoint_s=1e9) == 0
    return records(home)


def until(true, child, seconds=60):
    "Wait for `true()`, or for the end of the child."
    end = time.monotonic() + seconds
    while not true() and child.is_alive():
        assert time.monotonic() < end, f'nothing happened in {seconds} s'
        time.sleep(0.002)


def text(log):
    return log.read_text() if log.exists() else ''


def begun(log):
    return [(name, int(step)) for name, step in re.findall(r'(\S+) from step (\d+)', text(log))]


def folder(cfg):
    return f'{cfg.slug}-{cfg.hash}'


def checkpoints(home):
    return {(p.parent.name, p.stat().st_ino) for p in home.glob('*/checkpoint.safetensors')}


def records(home):
    "Every file below `home` that configs alone decide, as bytes."
    return {
        p.relative_to(home).as_posix(): p.read_bytes()
        for p in home.rglob('*')
        if p.is_file() and p.name not in OF_THE_MACHINE
    }


def of(cfg, found):
    return {k: v for k, v in found.items() if k.startswith(folder(cfg) + '/')}


def assert_same(a, b):
    assert sorted(a) == sorted(b)
    assert not [name for name in a if a[name] != b[name]], 'not the same bytes'
