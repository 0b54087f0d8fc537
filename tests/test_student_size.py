"""Binary students and students of other widths: killed and resumed, sharing a target cache, packed and read back.

The processes here are real: see children.py.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from children import (
    HALF_CUT,
    assert_same,
    begun,
    checkpoints,
    digit_net,
    folder,
    make,
    of,
    records,
    start,
    undisturbed,
    until,
)

from xcl.deploy import meaning_of, pack, pack_network, packed_size
from xcl.images import image_data
from xcl.recipe import Recipe
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.teachers import Ensemble
from xcl.train import METHODS, trained
from xcl.trainer import Trainer

DATA = image_data('digits', train_size=128)  # one step to an epoch
SGD = Recipe('sgd', 0.1, 128, 20, (6, 12, 16), gamma=0.2, weight_decay=5e-4)
ADAM = Recipe('adam', 2e-4, 128, 18, (8, 13))
TEACHER = digit_net(DATA, HALF_CUT, SGD, 1001)


def student(method, name='binary_resnet18', width=16, epochs=18):
    recipe = replace(ADAM if name.startswith('binary') else SGD, epochs=epochs, milestones=())
    method = METHODS[method]
    teachers = (TEACHER,) if method.objective.needs_teacher else ()
    return digit_net(DATA, method, recipe, 1, teachers, width, name=name)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Records of a binary student and its teacher, undisturbed."
    return undisturbed(tmp_path_factory, student('XCL-Mix'))


@pytest.mark.parametrize('wait', [1, 2])
def test_a_binary_student_is_killed_and_goes_on(reference, tmp_path, wait):
    "After its first, and after its second checkpoint. The real weights behind the bits are part of it."
    home, log = tmp_path / 'home', tmp_path / 'log'
    home.mkdir()
    assert make(TEACHER, home, log) == 0
    child, name = start(student('XCL-Mix'), home, log, pace=0.02), folder(student('XCL-Mix'))
    seen = set()

    def enough():
        seen.update(c for c in checkpoints(home) if c[0] == name)
        return len(seen) >= wait

    until(enough, child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, 'it had ended before it was killed'
    assert make(student('XCL-Mix'), home, log) == 0
    again = [step for run, step in begun(log) if run == name]
    assert len(again) == 2 and again[1] > 0, again
    assert_same(of(student('XCL-Mix'), records(home)), of(student('XCL-Mix'), reference))


def test_students_of_both_families_read_one_cache(monkeypatch, xcl_home):
    "Full precision and binary, other widths: one file. The teacher computes each step once."
    calls, outputs = [], Ensemble.member_outputs

    def counted(self, *inputs):
        calls.append(len(inputs[0]))
        return outputs(self, *inputs)

    monkeypatch.setattr(Ensemble, 'member_outputs', counted)
    caching = RuntimeConfig('cpu', progress=False, target_cache=True)
    ensure(TEACHER, caching)
    for name, width in ('resnet18', 24), ('binary_resnet18', 16):
        ensure(student('XCL-Mix', name, width, epochs=2), caching)
    assert len(list((xcl_home / 'targets').glob('*.targets'))) == 1
    # two steps, and once for each student the shape of the soft targets
    assert calls == [128] * 4


READER = """
import sys
import torch
from xcl.deploy import load
from xcl.images import image_data
from xcl.runtime import RuntimeConfig

_, val = image_data('digits', train_size=128).load(RuntimeConfig('cpu'))
net, meaning = load(sys.argv[1])
assert meaning.classes == tuple('0123456789') and meaning.size == (16, 16)
with torch.no_grad():
    torch.save(net(val.x[:100].float() / 255), sys.argv[2])
"""


@pytest.mark.parametrize(
    'net, width', [('binary_resnet18', 16), ('binary_resnet18', 8), ('resnet18', 16)]
)
def test_a_packed_file_gives_the_same_outputs_in_another_process(tmp_path, net, width):
    run = ensure(student('ERM', net, width, epochs=4), RuntimeConfig('cpu', progress=False))
    pack(run, tmp_path / 'student.xcl')
    reader = [sys.executable, '-c', READER, tmp_path / 'student.xcl', tmp_path / 'out.pt']
    subprocess.run(reader, check=True)
    _, val = DATA.load(RuntimeConfig('cpu'))
    with torch.no_grad():
        own = trained(run)(val.x[:100].float() / 255)
    assert torch.equal(torch.load(tmp_path / 'out.pt'), own)


def test_the_score_of_a_packed_file_is_that_of_its_run():
    "All test images through the packed network; the run used a folded copy, equal within rounding."
    run = ensure(student('ERM', epochs=4), RuntimeConfig('cpu', progress=False))
    packed = packed_size(run)
    assert abs(run.result['val_loss'] - packed['val_loss']) < 1e-4
    assert abs(run.result['top1'] - packed['top1']) <= 0.2  # two of 1,000 images


@pytest.mark.gpu
def test_a_binary_student_trains_on_a_gpu():
    "The same losses as on a CPU, convolutions in TF32; compiled as other networks are."
    cpu, gpu = (
        Trainer(student('ERM'), Run(student('ERM'), RuntimeConfig(d))) for d in ('cpu', 'cuda')
    )
    for loop in (cpu, gpu):
        for _ in range(3):
            loop.losses[0] = 0
            loop.train_step()
    torch.testing.assert_close(gpu.losses.cpu(), cpu.losses, rtol=2e-2, atol=1e-3)
    meaning = meaning_of(student('ERM'), gpu.net, gpu.val)
    pack_network(gpu.net, meaning, gpu.run.folder.parent / 'gpu.xcl')
