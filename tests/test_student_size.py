"""Section D as a grid: stopped anywhere it goes on where it was, nothing is trained or computed twice, and a
file that is read elsewhere gives the same outputs.

The processes here are real: see children.py.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
from children import (
    assert_same,
    begun,
    checkpoints,
    folder,
    make,
    of,
    records,
    start,
    undisturbed,
    until,
)

from xcl.deploy import meaning_of, pack, pack_network, packed_size
from xcl.files import home
from xcl.nets import net
from xcl.paper import section as sections
from xcl.paper.cifar import CifarSection, ResNet18Params
from xcl.paper.rows import CIFAR
from xcl.paper.student_size import StudentSizeParams, StudentSizeSection
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.teachers import Ensemble
from xcl.train import trained
from xcl.trainer import Trainer


def student(row, name='binary_resnet18', width=8, budget=0.03):
    "A student of 128 digits (one step to an epoch), and its teacher of one network."
    shape = dict(members=1, seeds=1, budget=budget, teacher_budget=0.05)
    exp = CifarSection('size', ResNet18Params.of(preset='smoke', device='cpu', **shape))
    return exp.student(CIFAR[row].sized(net(name, width=width), name), 1)


DATA = student('KD').data
TEACHER = student('KD').teachers


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "Records of a binary student and its teacher, undisturbed."
    return undisturbed(tmp_path_factory, student('XCL-Mix'))


@pytest.mark.parametrize('wait', [1, 2])
def test_a_binary_student_is_killed_and_goes_on(reference, tmp_path, wait):
    "After its first, and after its second checkpoint. The real weights behind the bits are part of it."
    home, log = tmp_path / 'home', tmp_path / 'log'
    home.mkdir()
    assert make(TEACHER[0], home, log) == 0
    child, name = start(student('XCL-Mix'), home, log, pace=0.1), folder(student('XCL-Mix'))
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


def section():
    "Two widths, one of each family, and two rows; one teacher."
    shape = dict(seeds=1, widths=8, binary_widths=16, rows='ERM, KD', store='half')
    P = StudentSizeParams.of(preset='smoke', device='cpu', **shape)
    return StudentSizeSection('student_size', P)


def test_a_grid_that_was_interrupted_goes_on(monkeypatch):
    "It stops at its fourth run; the second time, the first three are found and not touched."
    requested = []

    def stops(cfg, runtime):
        requested.append(cfg.hash)
        if len(requested) == 4:
            raise KeyboardInterrupt
        return ensure(cfg, runtime)

    with monkeypatch.context() as m:
        m.setattr(sections, 'ensure', stops)
        with pytest.raises(KeyboardInterrupt):
            section().run()
    before = {p: p.stat().st_mtime_ns for p in home().glob('*/result.json')}
    assert len(before) == 3
    exp = section().run()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert len(list(home().glob('*/result.json'))) == 6
    assert list(exp.runs) == list(exp.grid)
    assert len(exp.runs_table()) == 5  # four students and a teacher of two


def test_students_of_both_families_share_one_file_of_soft_targets(monkeypatch):
    """The first student computes them at each of its two steps. Both compute them once more, for
    their shape, and the second nothing else."""
    sizes, compute = [], Ensemble.member_outputs

    def counted(self, *inputs):
        sizes.append(len(inputs[0]))
        return compute(self, *inputs)

    monkeypatch.setattr(Ensemble, 'member_outputs', counted)
    exp = section().run()
    kd = [runs[0] for (row, _), runs in exp.runs.items() if row.startswith('KD')]
    first, second = kd
    assert first.cfg.recipe != second.cfg.recipe
    assert [run.result['steps'] for run in kd] == [2, 2]
    assert sizes == [128] * 4


READER = """
import sys
import torch
from xcl.deploy import load
from xcl.images import image_data
from xcl.runtime import RuntimeConfig

_, val = image_data('digits', train_size=128, test_size=100).load(RuntimeConfig('cpu'))
for path in sys.argv[1:]:
    net, meaning = load(path)
    assert meaning.classes == tuple('0123456789') and meaning.size == (16, 16)
    with torch.no_grad():
        torch.save(net(val.x[:100].float() / 255), path + '.out')
"""


def test_a_packed_file_gives_the_same_outputs_in_another_process(tmp_path):
    runs, cpu = {}, RuntimeConfig('cpu', progress=False)
    for name, width in ('binary_resnet18', 16), ('binary_resnet18', 8), ('resnet18', 16):
        path = tmp_path / f'{name}-{width}.xcl'
        runs[path] = ensure(student('ERM', name, width, budget=0.01), cpu)
        pack(runs[path], path)
    subprocess.run([sys.executable, '-c', READER, *runs], check=True)
    _, val = DATA.load(cpu)
    for path, run in runs.items():
        with torch.no_grad():
            own = trained(run)(val.x[:100].float() / 255)
        assert torch.equal(torch.load(f'{path}.out'), own), path.name


def test_the_score_of_a_packed_file_is_that_of_its_run():
    "All test images through the packed network; the run used a folded copy, equal within rounding."
    run = ensure(student('ERM', budget=0.01), RuntimeConfig('cpu', progress=False))
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
