"""Generated images across processes: killed sets, soft targets and students end in the same bytes.

What cannot be used is refused before anything is trained, and kept. Digits, networks of width 16, 128
training images; a generator that needs no training stands in for a GAN. Real kills happen in child
processes, which have one thread (see children.py).
"""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from children import (
    assert_same,
    begun,
    checkpoints,
    digit_net,
    make,
    records,
    start,
    taught_digits,
    text,
    until,
)
from torch import nn

from xcl import generators
from xcl.config import Config, rng, seeded
from xcl.eye_renderer import eye_factors, render
from xcl.gaze_data import EyeData
from xcl.generated import Offline, Online
from xcl.generated_sets import GeneratedSet, SetTargets, StoredSet, StoredTargets
from xcl.generators import ImageGenerator, Sampled, own_generator
from xcl.likelihoods import Gaussian
from xcl.nets import net
from xcl.objective import Labels, Teacher
from xcl.paper.rows import RECIPES, added_set, generated_transfers
from xcl.recipe import Recipe
from xcl.records import RecordFile
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.teachers import Ensemble
from xcl.train import METHODS, Method, Train
from xcl.trainer import Trainer
from xcl.transfer import Empirical

HERE = RuntimeConfig('cpu', progress=False, checkpoint_s=1e9)
SMALL = Recipe('sgd', 0.05, 32, 2, (1.5,), weight_decay=5e-4)  # 8 steps, 4 of them to an epoch
MEMBERS = 2


class Painter(nn.Module):
    "A generator: (z (b, 16), v (b, 8)) -> images (b, 3, 16, 16) in [-1, 1]; weights from a seed."

    def __init__(self, seed=1):
        super().__init__()
        with seeded(seed, 'painter'):
            self.net, self.table = nn.Linear(24, 768), nn.Embedding(10, 8)

    def forward(self, z, v):
        return self.net(torch.cat([z, v], 1)).tanh().view(-1, 3, 16, 16)


def painter(seed=1):
    net = Painter(seed)
    return ImageGenerator(net, net.table.weight, 16, 16)


@dataclass(frozen=True)
class Painted(Config):
    "A generator that is there at once."

    seed: int = 1

    def open_generator(self, runtime):
        return painter(self.seed)


@dataclass(frozen=True)
class Eyes(Config):
    "A maker of eyes, of a person who is nobody in the training set."

    person: int = 99

    def open(self, runtime):
        return self

    def make(self, seed, start, stop):
        f, gaze, pose, noise = eye_factors(seed, self.person, range(start, stop))
        return dict(
            x=render(f, gaze, pose, noise)[:, None].numpy(), y=gaze.numpy(), aux=pose.numpy()
        )


SET = GeneratedSet(Sampled(Painted()), 200, 1, block=32)  # 7 blocks
KINDS = {'online': Online(SET.sampler), 'offline': Offline(SET)}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A home with decoded digits and finished teachers, and the configs that everything here derives from."
    return taught_digits(tmp_path_factory.mktemp('base'), SMALL, MEMBERS)


@pytest.fixture
def ask(base, xcl_home):
    "A copy of the base in this test's home, and the function from a transfer set to a student."
    shutil.copytree(base.home, xcl_home)

    def student(transfer, seed=1, **kw):
        method = Method('XCL-GAN', transfer, Teacher())
        return digit_net(base.data, method, SMALL, seed, base.members, **kw)

    return student


@pytest.fixture
def counts(monkeypatch):
    "Images that this process generated and evaluated with teachers, and blocks that it wrote."
    seen = SimpleNamespace(generated=0, evaluated=0, written=0)

    def counting(name, f, size):
        def g(self, *a, **kw):
            setattr(seen, name, getattr(seen, name) + size(a))
            return f(self, *a, **kw)

        return g

    def images(args):
        return len(args[0])

    for owner, method, name, size in (
        (ImageGenerator, 'generate', 'generated', images),
        (Ensemble, 'member_outputs', 'evaluated', images),
        (RecordFile, 'write_record', 'written', lambda args: 1),
    ):
        monkeypatch.setattr(owner, method, counting(name, getattr(owner, method), size))
    return seen


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(Trainer, 'train_step', lambda self: pytest.fail('it trains'))


def loop(cfg):
    return Trainer(cfg, Run(cfg, HERE))


def soft(loop, batch, step):
    "The teachers' soft targets."
    return loop.targets(batch, step)[1]


def same(*batches):
    return all(
        torch.equal(u, v)
        for u, v in zip(*((*b.inputs, b.index, *b.generated.values()) for b in batches))
    )


def weights(cfg):
    return ensure(cfg, HERE).tensors()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def folders(home, word):
    return sorted(p for p in home.iterdir() if p.name.startswith(word))


# ---- a function of (seed, step) ----


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_made_twice_is_equal(ask, kind):
    "By two loops, which ask for the steps in another order; another step or seed gives another batch."
    a, b, other = (loop(ask(KINDS[kind], seed=s)) for s in (1, 1, 2))
    found = {step: a.batches(step) for step in (0, 5, 7)}
    for step in 7, 0, 5:
        assert same(found[step], b.batches(step))
        assert torch.equal(soft(a, found[step], step), soft(b, b.batches(step), step))
    assert not same(found[5], found[7]) and not same(found[5], other.batches(5))
    assert [
        len(found[0].index),
        len(found[0].generated['lam']),
        len(found[0].teacher_inputs[0]),
    ] == [
        16,
        16,
        32 if kind == 'online' else 16,
    ]


def test_one_class_is_a_plain_sample():
    "lam = 1, lam = 0 and i = j are G(z; v) of one class, bit for bit."
    g, z, i, j = painter(), torch.randn(9, 16), torch.arange(9), torch.arange(9).flip(0)
    with torch.no_grad():
        plain = ((g.net(z, g.table[i]) + 1) * 127.5).round().to(torch.uint8)
    for a, b, lam in (i, j, torch.ones(9)), (j, i, torch.zeros(9)), (i, i, torch.rand(9)):
        assert torch.equal(g(z, a, b, lam), plain)


@pytest.mark.parametrize('kind', KINDS)
def test_share_0_is_the_training_set(ask, counts, kind):
    "The same weights as KD's, and nothing is generated for a batch."
    assert equal(weights(ask(replace(KINDS[kind], share=0.0))), weights(ask(Empirical())))
    cfg = ask(replace(KINDS[kind], share=0.0))
    generated = counts.generated
    made = loop(cfg)
    for step in range(3):
        made.batches(step)
    assert counts.generated - generated <= 16, 'the probe of a generator, at most'


def test_rows_of_a_set_do_not_depend_on_its_size(base, xcl_home):
    few, many, apart = (
        StoredSet(ensure(replace(SET, n=n, block=b), HERE)).rows(range(40))
        for n, b in ((40, 32), (200, 32), (200, 7))
    )
    assert equal(few, many)
    assert (few['x'].int() - apart['x'].int()).abs().max() <= 1 and torch.equal(
        few['pair'], apart['pair']
    ), 'blocks of another size: rounding'


# ---- killed and resumed ----


def die_putting(k, when):
    "Have this process killed in its k-th block: with half of it in the file, before or after it is marked."
    call, put = itertools.count(1), RecordFile.write_record

    def dies(self, b, **fields):
        if next(call) != k:
            return put(self, b, **fields)
        if when == 'half':
            self.map[b][self.record.names[0]][:16] = next(iter(fields.values()))[:16]
        if when == 'unmarked':
            for name, v in fields.items():
                self.map[b][name] = v
        if when == 'marked':
            put(self, b, **fields)
        os.kill(os.getpid(), signal.SIGKILL)

    RecordFile.write_record = dies


@pytest.mark.parametrize('when, stops', [('half', 2), ('unmarked', 0), ('marked', 0)])
def test_killed_set_answers_and_student(ask, xcl_home, tmp_path, when, stops):
    "Killed in the 4th of 7 blocks of images and of soft targets, then in training: the same bytes."
    cfg, log, undisturbed = ask(KINDS['offline']), tmp_path / 'log', tmp_path / 'undisturbed'
    shutil.copytree(xcl_home, undisturbed)
    assert make(cfg, undisturbed, log, checkpoint_s=1e9) == 0
    for k in 4, 8:
        assert make(cfg, xcl_home, log, (die_putting, k, when)) == -signal.SIGKILL, text(log)
    assert (
        not Run(cfg).done and begun(log)[-1][0] == Run(cfg).folder.name and len(begun(log)) == 1
    ), 'no student was trained yet'
    kills, g = 0, rng(0, 'kills')

    def of_student():
        return {c for c in checkpoints(xcl_home) if c[0] == Run(cfg).folder.name}

    for _ in range(stops):
        seen, child = of_student(), start(cfg, xcl_home, log, checkpoint_s=1e-9, pace=0.1)
        until(lambda: of_student() - seen, child)  # noqa: B023
        time.sleep(g.uniform(0, 0.1))
        child.kill()
        child.join(60)
        kills += child.exitcode == -signal.SIGKILL and not Run(cfg).done
    assert make(cfg, xcl_home, log) == 0 and kills >= min(stops, 1), f'{kills} kills'
    assert stops == 0 or any(step for _, step in begun(log)), 'it was to go on from a checkpoint'
    assert_same(records(xcl_home), records(undisturbed))


def test_a_set_goes_on_where_it_was(xcl_home, tmp_path, counts):
    assert make(SET, xcl_home, tmp_path / 'log', (die_putting, 4, 'unmarked')) == -signal.SIGKILL
    run = ensure(SET, HERE)
    assert counts.written == 4, 'three of seven blocks were there'
    other = tmp_path / 'other'
    assert make(SET, other, tmp_path / 'log') == 0
    assert (run.folder / 'images.bin').read_bytes() == (
        other / run.folder.name / 'images.bin'
    ).read_bytes()


# ---- shared ----


def test_students_share_set_and_answers(ask, xcl_home, counts):
    "Another seed, temperature, width: nothing is generated, and the teacher sees training images alone."
    first = ensure(ask(KINDS['offline']), HERE)
    assert counts.written == 14
    stored = {p: p.read_bytes() for p in xcl_home.rglob('*.bin')}
    for kw in dict(seed=2), dict(T=5.0), dict(width=6):
        counts.generated = counts.evaluated = 0
        assert (
            ensure(ask(KINDS['offline'], **kw), HERE).result['target_entropy']
            != first.result['target_entropy']
            or 'width' in kw
        )
        assert (counts.generated, counts.evaluated, counts.written) == (0, 8 * 16, 14), kw
    assert {p: p.read_bytes() for p in xcl_home.rglob('*.bin')} == stored and len(stored) == 2


def test_online_generates_and_evaluates_at_each_step(ask, xcl_home, counts):
    cfg = ask(KINDS['online'])
    ensure(cfg, HERE)
    assert counts.evaluated == 8 * 32 and counts.generated == 10 + (1 + 1 + 8) * 16, (
        'the probe, two looks at the first batch, eight steps'
    )
    assert not list(xcl_home.rglob('*.bin'))


def test_target_cache_holds_what_the_teacher_saw(ask, xcl_home):
    "With a store of answers beside the set: the same weights, and only training images in it."
    live, store = ensure(ask(KINDS['offline']), HERE), replace(HERE, target_cache=True)
    shutil.rmtree(live.folder)
    again = ensure(live.cfg, store)
    [path] = xcl_home.glob('targets/*.targets')
    assert json.loads(path.read_bytes().split(b'\n')[0])['shape'] == [16, MEMBERS, 10]
    assert equal(again.tensors(), weights(live.cfg))


def test_no_step_moves_the_teacher(ask, monkeypatch):
    "Its BatchNorm statistics above all. This teacher has some that are not folded away."
    data = EyeData('procedural', split=1, people=3, held_out=1, per_person=32)
    teacher = gaze_net('preact_resnet', data, METHODS['MixUp'], 101)
    born, init = [], Ensemble.__init__
    monkeypatch.setattr(
        Ensemble, '__init__', lambda self, *a: (init(self, *a), born.append(self))[0]
    )
    for transfer in Online(Eyes()), added_set(Eyes(), 40, 64):
        cfg = gaze_net('lenet', data, Method('XCL-GAN', transfer, Teacher()), 1, (teacher,))
        made, network = loop(cfg), born[-1].members[0]
        before = {k: v.clone() for k, v in network.state_dict().items()}
        for _ in range(2):
            made.train_step()
        assert any('running_mean' in k for k in before)
        assert equal(network.state_dict(), before)
        assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))


# ---- gaze ----


def gaze_net(name, data, method, seed, teachers=()):
    "One epoch of a gaze network."
    recipe = replace(RECIPES[name], epochs=1, milestones=())
    return Train(net(name), Gaussian(), data, method, recipe, seed, teachers)


def test_added_eyes_bring_their_head_pose(xcl_home):
    "Network and teacher see the head pose with which each eye was rendered; its label is there too."
    data = EyeData('procedural', split=1, people=3, held_out=1, per_person=32)
    teacher = gaze_net('preact_resnet', data, METHODS['MixUp'], 101)
    transfer = added_set(Eyes(), 192, 64)
    assert transfer.share == 0.75  # of the union
    cfg = gaze_net('lenet', data, Method('XCL-GAN', transfer, Teacher()), 1, (teacher,))
    made = loop(cfg)
    batch = made.batches(1)
    rows = StoredSet(Run(transfer.set, HERE)).rows(batch.record)
    x, pose = batch.inputs
    assert (x.shape, len(batch.index)) == ((32, 1, 36, 60), 8)
    assert torch.equal(pose[8:], rows['aux'])
    live = Ensemble([teacher.network(HERE)], cfg.likelihood)
    torch.testing.assert_close(soft(made, batch, 1), live(x, pose), rtol=2e-3, atol=2e-3)
    labelled = gaze_net('lenet', data, Method('added eyes', transfer, Labels()), 1)
    assert torch.equal(loop(labelled).targets(batch, 1)[0][8:], rows['y'])
    kd = gaze_net('lenet', data, METHODS['KD'], 1, (teacher,))
    assert ensure(cfg, HERE).result['steps'] == ensure(kd, HERE).result['steps']


# ---- what cannot be used ----


def refused(cfg, *words):
    "The message with which a student is refused; files are as they were, but for what the attempt may add."
    home = Run(cfg).folder.parent
    before = {p: p.read_bytes() for p in home.rglob('*.bin')}
    with pytest.raises((ValueError, OSError)) as e:
        ensure(cfg, HERE)
    assert {p: p.read_bytes() for p in before} == before and not Run(cfg).done
    for w in words:
        assert w in str(e.value), e.value
    return e.value


def forty_classes(net):
    "A generator of 40 classes."

    def eight_columns(z, v):
        return net(z, v[:, :8])

    return ImageGenerator(eight_columns, torch.eye(40), 16, 16)


WRONG = {
    'size': (
        lambda net: ImageGenerator(net, net.table.weight, 16, 32),
        'images of shape (10, 3, 16, 16); expected (10, 3, 32, 32)',
    ),
    'latent': (
        lambda net: ImageGenerator(net, net.table.weight, 20, 16),
        'the generator fails on z (10, 20)',
    ),
    'table': (lambda net: ImageGenerator(net, torch.eye(10), 16, 16), 'class vectors (10, 10)'),
    'table of integers': (
        lambda net: ImageGenerator(net, torch.arange(10), 16, 16),
        'table is torch.int64 (10,)',
    ),
    'range 0 to 1': (
        lambda net: ImageGenerator(lambda z, v: (net(z, v) + 1) / 2, net.table.weight, 16, 16),
        'that is the range 0 to 1',
    ),
    'range 0 to 255': (
        lambda net: ImageGenerator(lambda z, v: (net(z, v) + 1) * 127, net.table.weight, 16, 16),
        'pixels from',
    ),
    'NaN': (
        lambda net: ImageGenerator(lambda z, v: net(z, v) / 0 * 0, net.table.weight, 16, 16),
        'NaN or infinity in 10 of 10',
    ),
    'other images': (
        lambda net: ImageGenerator(lambda z, v: net(z, v)[..., :8, :8], net.table.weight, 16, 8),
        'generated images are (3, 8, 8)',
    ),
    'more classes': (
        forty_classes,
        'the training set has classes 0 to 9',
    ),
}


@pytest.mark.parametrize('what', WRONG)
def test_a_generator_that_does_not_fit(ask, no_step, monkeypatch, what):
    "Refused when it is opened, or beside the training set, whether online or offline, and before a step."
    build, message = WRONG[what]
    monkeypatch.setattr(Painted, 'open_generator', lambda self, runtime: build(Painter()))
    for kind in KINDS:
        refused(ask(KINDS[kind]), message)


def test_a_generator_that_fails_later(xcl_home, monkeypatch, counts):
    "NaN in the fourth block, after a probe: three blocks are kept, and used once the generator is mended."
    linear, calls = nn.Linear.forward, itertools.count()

    def fails(self, x):
        return linear(self, x) * (1 if next(calls) < 5 else torch.nan)

    with monkeypatch.context() as m, pytest.raises(ValueError, match='NaN .* in 32 of 32 images'):
        m.setattr(nn.Linear, 'forward', fails)
        ensure(SET, HERE)
    assert counts.written == 3
    ensure(SET, HERE)
    assert counts.written == 7


DAMAGE = {
    'cut short': (lambda b: b[:-1000], 'is cut short'),
    'empty': (lambda b: b'', 'is cut short: 0 of'),
    'one bit': (
        lambda b: b[:-3000] + bytes([b[-3000] ^ 1]) + b[-2999:],
        '1 of 7 blocks are missing or fail their checksum',
    ),
    'no set': (lambda b: b'my holiday pictures', 'is no file of'),
    'header of another': (
        lambda b: b.replace(b'"format": "xcl', b'"format": "lcx', 1),
        'holds other',
    ),
}


@pytest.mark.parametrize('name', ['images.bin', 'targets.bin'])
@pytest.mark.parametrize('how', DAMAGE)
def test_damaged_files_are_refused_and_mended(
    ask, xcl_home, no_step, counts, monkeypatch, name, how
):
    "Nothing is trained. After what the message asks for, the file has its old bytes; whole blocks are kept."
    cfg, (change, message) = ask(KINDS['offline']), DAMAGE[how]
    answers = ensure(SetTargets(SET, cfg.teachers, cfg.likelihood.cache_key), HERE)
    [path] = xcl_home.glob(f'*/{name}')
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    message = str(refused(cfg, str(path), message))
    if 'result.json' in message:
        (path.parent / 'result.json').unlink()
    else:
        path.unlink()
        (path.parent / 'result.json').unlink()
    counts.written = 0
    ensure(answers.cfg, HERE), ensure(SET, HERE)
    assert path.read_bytes() == whole and counts.written == {'cut short': 1, 'one bit': 1}.get(
        how, 7
    )


def test_answers_of_another_teacher(ask, base, xcl_home, no_step):
    "The teacher has other weights under the same config: its old soft targets are refused, and stay."
    cfg = ask(KINDS['offline'])
    ensure(SetTargets(SET, cfg.teachers, cfg.likelihood.cache_key), HERE)
    weights, other = (Run(t).folder / 'weights.safetensors' for t in base.members)
    shutil.copy(other, weights)
    message = refused(cfg, 'targets.bin holds other soft targets: made_by is')
    assert re.search(r'made_by is [0-9a-f]{16}, expected [0-9a-f]{16}', str(message))


def test_answers_to_another_set(ask, xcl_home, no_step):
    "A set that was made again with other content, as on another device: answers to the old one are refused."
    cfg = ask(KINDS['offline'])
    answers = ensure(SetTargets(SET, cfg.teachers, cfg.likelihood.cache_key), HERE)
    with pytest.raises(ValueError, match='content is .*, expected fedcba9876543210'):
        StoredTargets(answers, 'x', 'fedcba9876543210')


@pytest.mark.parametrize('name', ['images.bin', 'targets.bin'])
def test_a_disk_that_is_too_small(ask, xcl_home, monkeypatch, no_step, counts, name):
    "Said before the first block; what is there stays."
    cfg = ask(KINDS['offline'])
    if name == 'targets.bin':
        ensure(SET, HERE)
    counts.written = 0
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    e = refused(cfg, name, 'Nothing was written')
    assert e.errno == errno.ENOSPC and counts.written == 0 and not list(xcl_home.glob(f'*/{name}'))


# ---- trained elsewhere ----


def test_a_generator_of_ones_own(ask, monkeypatch):
    "The same images as the same network under a config of ours; other weights are another run."
    net = Painter()
    cfg = own_generator(net, net.table.weight, 16, 16)
    assert equal(weights(ask(Online(Sampled(cfg)))), weights(ask(KINDS['online'])))
    again = Painter()
    assert own_generator(again, again.table.weight, 16, 16) == cfg
    other = Painter(2)
    assert own_generator(other, other.table.weight, 16, 16) != cfg

    def own(n):
        return own_generator(lambda z, v: n(z, v), net.table.weight, 16, 16)

    assert own(net) == cfg != own(other), 'a lambda is named by what it calls'
    with torch.no_grad():
        net.net.bias += 0.5
    own_run = ask(Online(Sampled(own_generator(again, again.table.weight, 16, 16))), seed=5)
    monkeypatch.setitem(
        generators._GENERATORS, cfg.digest, ImageGenerator(net, net.table.weight, 16, 16)
    )
    refused(own_run, f'this run was defined on {cfg.digest}')
    monkeypatch.delitem(generators._GENERATORS, cfg.digest)
    refused(own_run, f'no generator of digest {cfg.digest} in this process')


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 80).view(10, 8))
        self.weight = nn.Parameter(torch.linspace(-1, 1, 24 * 768).view(24, 768) ** 3)

    def forward(self, z, v):
        return (torch.cat([z, v], 1) @ self.weight).tanh().view(-1, 3, 16, 16)

def load():
    net = Net()
    return net, net.table, 16, 16
"""


def test_a_generator_by_name_is_the_same_run_in_another_process(tmp_path):
    "Another process imports it only where it is told to by name; then the digest is the same."
    (tmp_path / 'my_generator.py').write_text(MODULE)
    program = """
import sys
from xcl.generators import OwnGenerator, generator_sources, own_generator
from xcl.runtime import RuntimeConfig
here = RuntimeConfig('cpu')
if sys.argv[1:]:
    digest, z_dim, size = sys.argv[1], 16, 16
    try:
        OwnGenerator(digest, 10, z_dim, size).open_generator(here)
    except ValueError as e:
        assert 'my_generator' not in sys.modules and 'in other processes own_generator' in str(e)
    else:
        raise AssertionError('opened before it was named')
cfg = own_generator('my_generator:load')
assert generator_sources() == {cfg.digest: 'my_generator:load'}
cfg.open_generator(here)
print(cfg.digest)
"""
    env = {**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}

    def digest(*args):
        call = [sys.executable, '-c', program, *args]
        return subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout

    first = digest().strip()
    assert digest(first).strip() == first and re.fullmatch('[0-9a-f]{16}', first)


class Normalised(nn.Module):
    "Painter and a BatchNorm behind it."

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net, self.drop = Painter(), nn.Dropout(dropout)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, z, v):
        return self.drop(self.norm(self.net(z, v))).tanh()


OWN_WRONG = {
    'batch': (lambda: Normalised(), 'depend on the other images of their batch'),
    'dropout': (lambda: Normalised(0.5), 'other images when it is called again'),
    'NaN': (lambda: lambda z, v: Painter()(z, v) * torch.nan, 'NaN or infinity'),
    'range': (lambda: lambda z, v: Painter()(z, v) / 2 + 0.5, 'range 0 to 1'),
    'shape': (lambda: lambda z, v: Painter()(z, v)[:, :1], 'images of shape (10, 1, 16, 16)'),
}


@pytest.mark.parametrize('name', OWN_WRONG)
def test_a_generator_of_ones_own_that_is_refused(name):
    "In train mode, with a source of noise of its own, or as any generator is; its statistics stay."
    build, message = OWN_WRONG[name]
    net = build()
    with pytest.raises(ValueError) as e:
        own_generator(net, torch.randn(10, 8), 16, 16)
    assert message in str(e.value)
    if isinstance(net, nn.Module):
        assert net.norm.num_batches_tracked == 0 and not net.norm.running_mean.any()
        own_generator(net.eval(), torch.randn(10, 8), 16, 16)


def test_a_generator_in_half_precision():
    net = Painter().bfloat16()
    half = own_generator(
        lambda z, v: net(z.bfloat16(), v.bfloat16()), net.table.weight.float(), 16, 16
    )
    x = half.open_generator(HERE).probe()
    assert x.dtype == torch.float32 and (x - painter().probe()).abs().max() < 0.05


def test_transfer_sets_of_section_a6():
    found = generated_transfers(Painted(), 1000, 7, share=0.25)
    sampler = Sampled(Painted())
    assert found == {
        'XCL-GAN online': Online(sampler, 0.25),
        'XCL-GAN offline': Offline(GeneratedSet(sampler, 1000, 7), 0.25),
    }
