"""All kinds of training on a device that is none (pretend.py), beside the same training on the CPU; and
what comes after training: sections of the paper from their notebooks. Prints a line of JSON for each case.

    python tests/on_pretended.py steps FOLDER        FOLDER is empty; test_device.py starts both parts
    python tests/on_pretended.py after FOLDER"""

import ast
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from pretend import CROSSINGS, NAME

import xcl.predict
import xcl.runtime
from xcl.deploy import load, pack, packed_size
from xcl.diff_augment import DiffAugment
from xcl.evaluate import evaluate
from xcl.generated import Offline
from xcl.generated_sets import GeneratedSet
from xcl.generators import Sampled
from xcl.paper.imagenet import ImagenetParams, ImagenetSection
from xcl.paper.report import Report
from xcl.paper.rows import CIFAR, GAN, GAZE, added_set
from xcl.refine import Refined
from xcl.refine_quality import gaze_preservation
from xcl.runtime import RuntimeConfig
from xcl.simulated_eyes import simulated_eyes
from xcl.teacher_check import TeacherMismatch
from xcl.train import METHODS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_acceptance as bench  # noqa: E402

SCALE = replace(bench.TINY, batch=8, images=32, members=1, photos=4)


def allow_device():
    "Let RuntimeConfig know the device, and choose it where it may choose."
    xcl.runtime._device = lambda name: NAME if name == 'auto' else name


def runtime_of(device, **more):
    "Where a case is trained."
    return RuntimeConfig(device, progress=False, checkpoint_s=1e9, workers=0, **more)


def attempt(name, f, *args):
    "Print what a case returns, or how it fails."
    began = time.process_time()
    try:
        facts = f(*args)
    except Exception as e:
        where = traceback.format_exc().splitlines()[-12:]
        facts = dict(error=f'{type(e).__name__}: {e}'[:400], where=where)
    facts['seconds'] = round(time.process_time() - began, 1)
    print(json.dumps(dict(name=name, **facts)), flush=True)


# Steps


def steps_there(cfg, runtime):
    "Three steps on the device, with a resume after the first; (trainer, what the third waits for)."
    trainer = bench.trainer_of(cfg, runtime)
    trainer.train_step()
    trainer.save()
    trainer = bench.trainer_of(cfg, runtime, resume=True)
    trainer.train_step()
    CROSSINGS.clear()
    trainer.train_step()
    return trainer, Counter(f'{c.place}, {c.what}' for c in CROSSINGS if c.waits)


def compared(make, **more):
    "Whether a training gives the bits of the CPU, and what a step waits for."
    cfg = make()
    trainer, waits = steps_there(cfg, runtime_of(NAME, **more))
    expected = bench.trainer_of(cfg, runtime_of('cpu', **more))
    for _ in range(3):
        expected.train_step()
    a, b = bench.weights(trainer), bench.weights(expected)
    facts = dict(same=all(torch.equal(t, b[k]) for k, t in a.items()), waits=waits)
    if getattr(cfg, 'method', None) == METHODS['ERM']:  # others are validated in the same way
        out = bench.outputs(trainer), bench.outputs(expected)
        facts['close'] = torch.allclose(*out, rtol=1e-4, atol=1e-5)  # in batches of another size
    for t in trainer, expected:
        bench.end(t)
    return facts


def more_kinds(c):
    "Kinds of training that the benchmark leaves out: name -> function () -> config."
    rendered = added_set(simulated_eyes(), 32, 240)

    def stored():
        images = GeneratedSet(Sampled(bench.untrained(c.gan())), 32, 1)
        return c.image(GAN['XCL-GAN offline'].on(Offline(images)))

    def augmented():
        gan = c.gan()
        return replace(gan, recipe=replace(gan.recipe, d_steps=2, augment=DiffAugment()))

    return {
        **{f'gaze {k}': partial(c.gaze, GAZE[k]) for k in ('MixUp', 'KD')},
        'gaze XCL-Sim': partial(c.gaze, GAZE['XCL-Sim'].on(rendered)),
        'resnet18 LS': partial(c.image, CIFAR['LS']),
        'resnet18 XCL-GAN offline': stored,
        'BigGAN DiffAugment': augmented,
    }


def all_steps(folder):
    "Compare every kind of training."
    c = bench.Configs(SCALE, 'cpu')
    kinds = bench.small_kinds(c) | more_kinds(c)
    for name in 'BigGAN', 'gaze teacher', 'resnet18 KD':  # others go the same way
        del kinds[name]
    for name, make in kinds.items():
        attempt(name, compared, make)
    cached = partial(compared, target_cache=True)
    attempt('resnet18 XCL-Mix stored', cached, partial(c.image, CIFAR['XCL-Mix'], targets='half'))


# What comes after training

SMALL = dict(preset='smoke', seeds=1, members=1)
SECTIONS = dict(
    gaze=dict(SMALL, per_person=8, rows='ERM, point, ERM, XCL-GAN', generated=32),
    resnet18=dict(SMALL, width=4, rows='ERM, XCL-Mix', train_size=128, teacher_train_size=256),
    gan=dict(SMALL, width=4, per_person=8, rows='ERM, XCL-GAN offline', generated_eyes=32),
    imagenet=dict(SMALL, drawn=4, rows='ERM, XCL-Mix', workers=0),
)
LEFT_OUT = 'cost_table'  # six seconds on networks of the paper's size; nothing on a device


def statements(name):
    "Statements of a section's notebook, as text."
    cells = json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text())['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return [ast.unparse(node) for node in ast.parse(code).body]


def section(name, given):
    "Execute a section's notebook with other parameters; return its variables."
    names = dict(given)
    for text in statements(name):
        if text.partition(':')[0] not in given and LEFT_OUT not in text:
            exec(text, names)
    return names


def use_refined(exp, folder):
    "Measure how refinement moves the gaze that a network predicts."
    samplers = exp.gan(1).source, Refined(exp.gan(1))
    rendered, refined = (s.open(exp.runtime).make(1, 0, 16) for s in samplers)
    assert gaze_preservation(exp.ensemble('ERM, point'), rendered, refined)['moved_deg'] > 0


def use_packed(exp, folder):
    "Evaluate a run, and predict images, from packed files."
    run = exp.runs['ERM', 1][0]
    run.runtime = exp.runtime
    in_file = packed_size(run, runtime=exp.runtime)
    path = run.folder / 'packed-32.safetensors'
    score = evaluate(load(path)[0], exp.images, exp.runtime)
    image = folder / 'image.png'
    Image.new('RGB', (16, 16)).save(image)
    xcl.predict.main([str(path), str(image), '--device', NAME])
    assert abs(score['top1'] - in_file['top1']) < 1e-6


def use_given(exp, folder):
    "Check a teacher that was trained elsewhere; it has learnt nothing, and is refused at last."
    path = folder / 'teacher.xcl'
    pack(exp.runs['teacher', 1][0], path)
    P = exp.P.to_dict() | dict(teacher='xcl', weights=str(path))
    try:
        ImagenetSection('imagenet', ImagenetParams.of(**P)).readings()
    except TeacherMismatch:
        return


AFTER = dict(gaze=use_refined, resnet18=use_packed, imagenet=use_given)


def after(name, given, folder):
    "Run a section and what is called with its runs; how much crosses between the devices."
    CROSSINGS.clear()
    names = section(name, given)
    if name in AFTER:
        AFTER[name](names['exp'], folder)
    return dict(crossings=len(CROSSINGS))


def all_sections(folder):
    "Run sections on the device; their pictures are drawn, and not kept."
    Report.show = lambda *args, **kw: None
    for name, given in SECTIONS.items():
        attempt(f'section {name}', after, name, given, folder)


def main():
    "Run the cases of a part."
    part, folder = sys.argv[1], Path(sys.argv[2])
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    os.environ |= dict(XCL_HOME=str(folder / 'home'), XCL_COMMIT='none')  # and git is not asked
    allow_device()
    dict(steps=all_steps, after=all_sections)[part](folder)


if __name__ == '__main__':
    main()
