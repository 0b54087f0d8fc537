"""The step that a GPU captures, run on the CPU: the numbers of an eager step, and nothing in it that would
wait for a GPU or copy to it."""

import contextlib
from dataclasses import replace

import pytest
import torch
from children import digit_net, taught_digits
from torch.utils._python_dispatch import TorchDispatchMode

from xcl.captured import hold_lr, set_lr
from xcl.diff_augment import DiffAugment
from xcl.gans import BigGAN, GanRecipe, GanTrainer
from xcl.gaze_data import eye_data
from xcl.likelihoods import Gaussian
from xcl.nets import net
from xcl.recipe import Recipe
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.step_plan import PlannedBatches, StepPlan, can_plan
from xcl.train import METHODS, Train
from xcl.trainer import Trainer

HERE = RuntimeConfig('cpu', progress=False, checkpoint_s=1e9)
SGD = Recipe('sgd', 0.05, 32, 2, (1.0,), weight_decay=5e-4)
ADAM = Recipe('adam', 1e-3, 32, 2, (1.0,))


class NoWaits(TorchDispatchMode):
    "Raises where an operation would read a number from a GPU, or make a tensor of a number of the host."

    waits = '_local_scalar_dense', 'nonzero', 'masked_select', 'lift_fresh', 'lift_fresh_copy'

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.__name__.partition('.')[0] not in self.waits, op
        return op(*args, **(kwargs or {}))


def device_steps(cfg, n):
    "A trainer after n steps as a graph would hold them, the first one as it is."
    trainer = Trainer(cfg, Run(cfg, HERE))
    assert can_plan(trainer.batches)
    trainer.batches = PlannedBatches(trainer.batches)
    hold_lr(trainer.opt, 'cpu', torch.float64)
    for step in range(n):
        trainer.batches.plan.begin(step)
        set_lr(trainer.opt, cfg.recipe.lr_at(step, trainer.per_epoch))
        if step:
            with NoWaits():
                trainer.device_step()
        else:
            trainer.device_step()
        trainer.step += 1
    return trainer


def eager_steps(cfg, n):
    trainer = Trainer(cfg, Run(cfg, HERE))
    for _ in range(n):
        trainer.train_step()
    return trainer


def check(cfg, n):
    "Both give the same weights, statistics and losses, bit for bit."
    a, b = device_steps(cfg, n), eager_steps(cfg, n)
    weights = b.net.state_dict()
    assert all(torch.equal(t, weights[k]) for k, t in a.net.state_dict().items())
    assert torch.equal(a.track, b.track)
    assert (a.losses[: n % a.per_epoch] > 0).all()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return taught_digits(tmp_path_factory.mktemp('digits'), SGD, 2)


TAUGHT = [
    (m, t) for m in METHODS for t in ('exact', 'half') if t == 'exact' or m in ('KD', 'XCL-Mix')
]


@pytest.mark.parametrize('method, targets', TAUGHT)
def test_digits(digits, monkeypatch, method, targets):
    monkeypatch.setenv('XCL_HOME', str(digits.home))
    m = METHODS[method]
    members = digits.members if m.objective.needs_teacher else ()
    kw = dict(targets=targets) if members else {}
    check(digit_net(digits.data, m, SGD, 1, members, **kw), 5)


@pytest.mark.parametrize('method', ['ERM', 'KD', 'XCL-Mix'])
def test_eyes(xcl_home, method):
    eyes = eye_data('procedural', '', split=1, per_person=16)
    m = METHODS[method]

    def config(name, method, seed, teachers=()):
        return Train(net(name), Gaussian(), eyes, method, replace(ADAM, epochs=1), seed, teachers)

    teachers = ()
    if m.objective.needs_teacher:
        teachers = tuple(config('lenet', METHODS['ERM'], s) for s in (1001, 1002))
        for t in teachers:
            ensure(t, HERE)
    check(config('lenet', m, 1, teachers), 4)


def test_biggan(digits, monkeypatch):
    monkeypatch.setenv('XCL_HOME', str(digits.home))
    recipe = GanRecipe(16, 16, 20, 12, d_steps=2, augment=DiffAugment())
    loops = []
    for chunk in 1, 5:
        cfg = BigGAN(digits.data, recipe, seed=1, every=5)
        loop = GanTrainer(cfg, Run(cfg, HERE))
        loop.plan = StepPlan(loop.plan.draw, 'cpu', chunk)
        loop.plan.begin(0)
        loops.append(loop)
        for opt in (loop.opt_g, loop.opt_d) if chunk > 1 else ():
            hold_lr(opt, 'cpu', torch.float64)
        for _ in range(7):
            loop.train_step()
    a, b = (loop.pack() for loop in loops)
    assert all(torch.equal(t, b[k]) for k, t in a.items())
    loop.plan.begin(loop.step)
    loop.device = 'a GPU, where losses are checked later'
    monkeypatch.setattr('xcl.gans.bf16_autocast', lambda *_: contextlib.nullcontext())
    with NoWaits():
        loop.update_networks()


def test_a_wait_is_seen():
    for f in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x + torch.tensor(2.0)):
        with pytest.raises(AssertionError), NoWaits():
            f(torch.ones(2)[0])
