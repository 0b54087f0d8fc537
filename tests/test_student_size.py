"""Section D's grid as a whole: stopped anywhere it goes on where it was, nothing is trained or asked twice, and a file read elsewhere says the same.

The processes here are real: see children.py.
"""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

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

from xcl import classify
from xcl.deploy import meaning_of, pack, pack_network, packed_size
from xcl.images import image_data
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.teachers import Teacher
from xcl.train import Trainer, image_run, image_teachers, trained

DATA = image_data('digits', train_size=128)  # one step to an epoch
SHAPES = {'resnet18': (('width', 16),), 'binary_resnet18': (('width', 16),)}
TEACHER = image_teachers('+ CutMix', DATA, 1, 1, 0.05, SHAPES)


def student(row, net='binary_resnet18', width=16, budget=0.05):
    return image_run(row, DATA, 1, budget, {net: (('width', width),)}, TEACHER, net)


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


def section():
    P = SimpleNamespace(
        **classify.PRESETS['smoke']
        | dict(seed=1, preset='smoke', data_dir='', device='cpu', changed={}, store='half')
    )
    return classify.section('student_size', P)


def grid(S, crowd):
    "Two widths and both families of two rows; one teacher."
    cells = [
        (row, net, w)
        for net, w in (('resnet18', 8), ('binary_resnet18', 16))
        for row in ('ERM', 'KD')
    ]
    return {
        ('teacher', 1): crowd,
        **{
            (f'{row}, {net} {w}', 1): classify.student(S, row, 1, crowd, net, w)
            for row, net, w in cells
        },
    }


def test_a_grid_that_was_interrupted_goes_on(monkeypatch, capsys):
    "It stops at its fourth run; the second time, the first three are found, not touched, and all of it is counted."
    S = section()
    g, asked = grid(S, classify.teachers(S)), []

    def stops(cfg, runtime):
        asked.append(cfg.hash)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ensure(cfg, runtime)

    with monkeypatch.context() as m:
        m.setattr(classify, 'ensure', stops)
        with pytest.raises(KeyboardInterrupt):
            classify.run_all(S, g)
    home = classify.home()
    before = {p: p.stat().st_mtime_ns for p in home.glob('*/result.json')}
    assert len(before) == 3 and capsys.readouterr().out.splitlines()[-1].startswith('3/6')
    runs = classify.run_all(S, g)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if '/6' in line] == [f'{k}/6' for k in range(1, 7)]
    assert (
        all(p.stat().st_mtime_ns == t for p, t in before.items())
        and len(list(home.glob('*/result.json'))) == 6
    )
    assert list(runs) == list(g)


def test_students_of_both_families_read_one_store(monkeypatch):
    "A file for both. The first asks at each of its two steps; both ask once more, for the shape of an answer, and the second nothing else."
    S, asked, outs = section(), [], Teacher.outs
    monkeypatch.setattr(
        Teacher, 'outs', lambda self, *inputs: asked.append(len(inputs[0])) or outs(self, *inputs)
    )
    g = grid(S, classify.teachers(S))
    classify.run_all(S, g)
    assert len(list((classify.home() / 'answers').glob('*.answers'))) == 1
    first, second = (g[k] for k in g if k[0].startswith('KD'))
    assert [ensure(c, S.runtime).result['steps'] for c in (first, second)] == [
        2,
        2,
    ] and first.recipe != second.recipe
    assert asked == [128] * 4


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
    run = ensure(student('ERM', net, width, budget=0.01), RuntimeConfig('cpu', progress=False))
    pack(run, tmp_path / 'student.xcl')
    reader = [sys.executable, '-c', READER, tmp_path / 'student.xcl', tmp_path / 'out.pt']
    subprocess.run(reader, check=True)
    _, val = DATA.load(RuntimeConfig('cpu'))
    with torch.no_grad():
        own = trained(run)(val.x[:100].float() / 255)
    assert torch.equal(torch.load(tmp_path / 'out.pt'), own)


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
