"""Teachers from elsewhere: what people have goes in, what is not a teacher is refused by name.

Checkpoints as training scripts write them, damaged ones from a generator, and modules that are no
function of one image.
"""

import argparse
import os
import subprocess
import sys

import numpy as np
import own_nets
import pytest
import torch
from children import digit_net
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from xcl.config import rng, seeded
from xcl.deploy import pack
from xcl.images import image_data
from xcl.likelihoods import Categorical
from xcl.pretrained import Given, given
from xcl.recipe import Recipe
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig
from xcl.train import METHODS
from xcl.weight_files import read_weights

CPU = RuntimeConfig('cpu', progress=False)
HALF = dict(mean=(0.5,) * 3, std=(0.25,) * 3)


def tiny(seed=0):
    "A network of a user, with statistics that differ from their initial values."
    with seeded(seed, 'tiny'):
        net = own_nets.Plain(10)
        net.train()(torch.rand(8, 3, 16, 16))
    return net.eval()


STATE = tiny().state_dict()
EMA = {k: v.clone() for k, v in STATE.items()}
ZERO = {k: 0 * v for k, v in STATE.items()}
BESIDE = dict(
    epoch=np.int64(90),
    best_acc1=np.float64(71.25),
    history=np.arange(4.0),
    args=argparse.Namespace(lr=0.1),
    optimizer=torch.optim.SGD(tiny().parameters(), 0.1, momentum=0.9).state_dict(),
)
CHECKPOINTS = {
    'state.pth': STATE,
    'imagenet.pth.tar': dict(state_dict={f'module.{k}': v for k, v in STATE.items()}, **BESIDE),
    'BEST.PTH': dict(model_state_dict=STATE, **BESIDE),
    'lightning.ckpt': dict(state_dict={f'model.{k}': v for k, v in STATE.items()}, **BESIDE),
    'cutmix.th': dict(net=STATE, **BESIDE),
    'compiled.pt': dict(model={f'_orig_mod.module.{k}': v for k, v in STATE.items()}),
    'averaged.bin': dict(model=ZERO, model_ema=EMA, **BESIDE),
    'averaged.pt': dict(state_dict=ZERO, state_dict_ema=EMA),
    'weights.safetensors': STATE,
    'Weights.SafeTensors': STATE,
}


def write(path, content):
    save_file(content, path) if path.suffix.lower() == '.safetensors' else torch.save(content, path)
    return path


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_checkpoint_as_people_write_it_is_a_teacher(tmp_path, name):
    teacher = given(write(tmp_path / name, CHECKPOINTS[name]), net=own_nets.Plain, classes=10)
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(CPU)(x), tiny()(x), rtol=1e-5, atol=1e-6)
    assert teacher == given(write(tmp_path / 'p.pth', STATE), net=own_nets.Plain, classes=10)
    assert type(teacher).__name__ == 'Given' and teacher.n_out == 10


def test_a_checkpoint_of_older_numpy_is_read(tmp_path, monkeypatch):
    "NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core: both names are plain values."
    path = write(tmp_path / 'a.pth', dict(net=STATE, **BESIDE))
    data = path.read_bytes()
    new, old = b'numpy._core.multiarray', b'numpy.core.multiarray'
    if new in data:
        import zipfile

        other = tmp_path / 'b.pth'
        with zipfile.ZipFile(path) as a, zipfile.ZipFile(other, 'w') as b:
            for n in a.namelist():
                b.writestr(n, a.read(n).replace(new, old))
        path = other
    assert set(read_weights(path)) == set(STATE)


def odd(**kw):
    return {k: v for k, v in (STATE | kw).items() if v is not None}


class Code:
    def __reduce__(self):
        return os.system, ('touch was-run',)


BIAS = STATE['fc.bias']
REFUSED = {
    'another head': (odd(**{'fc.weight': torch.zeros(1000, 6)}), r'fc.weight is \(1000, 6\)'),
    'missing': (odd(**{'bn.bias': None}), '1 missing: bn.bias'),
    'left over': (odd(head=BIAS), '1 left over: head'),
    'NaN': (odd(**{'fc.bias': BIAS * torch.nan}), 'fc.bias holds NaN'),
    'int': (odd(**{'fc.bias': BIAS.long()}), 'fc.bias is int64, expected float32'),
    'bool': (odd(**{'fc.bias': BIAS > 0}), 'fc.bias is bool, expected float32'),
    'complex': (odd(**{'fc.bias': BIAS + 0j}), 'fc.bias is complex64; allowed'),
    'fp8': (odd(**{'fc.bias': BIAS.to(torch.float8_e5m2)}), 'fc.bias is float8_e5m2; allowed'),
    'sparse': (odd(**{'fc.bias': BIAS.to_sparse()}), 'fc.bias is sparse_coo float32; allowed'),
    'variance': (odd(**{'bn.running_var': -torch.ones(6)}), 'running_var holds -1; allowed: 0'),
    'int keys': (dict(enumerate(STATE.values())), 'keys like 0; expected names'),
    'a whole module': (nn.Linear(2, 2), r'write torch.save\(model.state_dict'),
    'a program': (dict(state_dict=STATE, hook=Code()), 'more than tensors and plain values'),
    'a list': (list(STATE.values()), 'holds no tensors by name'),
    'no tensors': (dict(epoch=3), 'holds no tensors by name'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_teacher_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, words = REFUSED[name]
    path = write(tmp_path / 'odd.pth', content)
    with pytest.raises(ValueError, match=rf'(?s)odd\.pth.*{words}'):
        given(path, net=own_nets.Plain, classes=10)
    assert not (tmp_path / 'was-run').exists()


TEXTS = {
    'page.pth': (b'\n<!DOCTYPE html><html></html>', 'is a web page; download the file itself'),
    'pointer.pth': (b'version https://git-lfs.github.com/spec/v1\n', 'run `git lfs pull`'),
    'readme.pth': (b'weights of a network', 'is text; expected tensors'),
    'empty.pth': (b'', 'is empty; expected tensors'),
    'noise.pth': (bytes(range(256)), 'is damaged'),
    'noise.safetensors': (bytes(range(256)), 'is damaged'),
    'weights.h5': (b'\x89HDF', 'is of an unknown kind; allowed: .safetensors'),
}


@pytest.mark.parametrize('name', TEXTS)
def test_files_that_hold_something_else_are_refused(tmp_path, name):
    content, words = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        given(tmp_path / name, net=own_nets.Plain, classes=10)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('block', range(2))
def test_damaged_checkpoints_are_refused_or_hold_tensors(tmp_path, suffix, block):
    "200 damages. A checkpoint has no digest: a flipped bit inside a number may pass, as a number."
    path, g = write(tmp_path / f'net{suffix}', STATE), rng(2, suffix, block)
    whole, read = path.read_bytes(), 0
    for _ in range(50):
        i, n = int(g.integers(len(whole))), int(g.integers(1, 64))
        bad = whole[:i] if g.random() < 0.5 else whole[:i] + g.bytes(n) + whole[i + n :]
        path.write_bytes(bad)
        try:
            state = read_weights(path)
        except ValueError as e:
            assert path.name in str(e)
        else:
            read += 1
            assert all(isinstance(v, torch.Tensor) for v in state.values())
            assert bad[:i] != bad, 'a file cut short was read'
    assert read < 40


# ---- modules ----


class Batchwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return self.net(x) - self.net(x).mean(0)


class Counting(Batchwise):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) + self.calls


MODULES = {
    'other images of the batch': (Batchwise(), 'alone than in a batch'),
    'dropout in eval mode': (own_nets.Dropping(10), 'other outputs on a second call'),
    'a counter': (Counting(), 'other outputs on a second call'),
    'a feature map': (nn.Conv2d(3, 10, 3), r'the teacher gives \(4, 10, 30, 30\)'),
    'other classes': (own_nets.Plain(7), 'the teacher has 7 outputs; expected 10'),
    'NaN': (nn.Sequential(tiny(), nn.Threshold(1e9, float('nan'))), 'gives NaN or infinity'),
    'another input': (nn.Linear(5, 10), r'takes none of these images.*Pass shape='),
}


@pytest.mark.parametrize('name', MODULES)
def test_a_module_that_is_no_function_of_one_image_is_refused(name):
    module, words = MODULES[name]
    with pytest.raises(ValueError, match=f'(?s){words}'):
        given(module, classes=10)


def test_a_module_in_train_mode_is_copied_into_eval_mode():
    net = tiny().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher = given(net, classes=10)
    assert net.training and not teacher.network(CPU).training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.fc.bias.data += 1  # later changes do not reach the teacher
    assert given(net, classes=10) != teacher
    assert torch.equal(teacher.network(CPU).fc.bias, before['fc.bias'])


def test_a_normalised_module_takes_plain_images():
    net, x = tiny(), torch.rand(4, 3, 16, 16)
    teacher = given(net, classes=10, **HALF)
    with torch.no_grad():
        want = net((x - 0.5) / 0.25)
        torch.testing.assert_close(teacher.network(CPU)(x), want, rtol=1e-5, atol=1e-6)
    assert teacher != given(net, classes=10)


def test_torchvision_as_a_module_and_as_weights(tmp_path):
    with seeded(0, 'tv'):
        net = resnet18(num_classes=10).eval()
    module = given(net, classes=10, **HALF)
    path = write(tmp_path / 'tv.pth', net.state_dict())
    x = torch.rand(2, 3, 64, 64)
    timms = given(path, net='resnet18', classes=10, **HALF)  # timm's names are torchvision's here
    with torch.no_grad():
        a, b = module.network(CPU)(x), timms.network(CPU)(x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


OTHER = """
import sys
from xcl.config import Config
from xcl.pretrained import Given
try:
    Given('module', 'Plain', sys.argv[1], 10).network()
except ValueError as e:
    print(e)
"""


def test_a_module_of_another_process_is_refused_with_advice():
    teacher = given(tiny(), classes=10)
    args = [sys.executable, '-c', OTHER, teacher.digest]
    done = subprocess.run(args, check=True, capture_output=True, text=True)
    assert 'is a module of another process; save its state_dict and use given(' in done.stdout


# ---- an ensemble teaches ----


def test_an_ensemble_of_files_and_a_packed_file_teach_a_student(tmp_path):
    data = image_data('digits', train_size=128, test_size=100)
    recipe = Recipe('sgd', 0.1, 128, 4)
    run = ensure(digit_net(data, METHODS['ERM'], recipe, 1), CPU)
    pack(run, tmp_path / 'teacher.xcl')
    paths = [write(tmp_path / f'{i}.pth', tiny(i).state_dict()) for i in range(2)]
    pair = given(*paths, net=own_nets.Plain, classes=10)
    teachers = (*pair, given(tmp_path / 'teacher.xcl'), given(tiny(3), classes=10))
    assert len(pair) == 2 and len({t.digest for t in teachers}) == 4
    cfg = digit_net(data, METHODS['KD'], recipe, 1, teachers)
    assert cfg.method == METHODS['KD'] and ensure(cfg, CPU).done
    assert all(isinstance(t, Given) for t in cfg.teachers)
    assert cfg.likelihood == Categorical(10)
