"""Section A.5: a folder of a user's own, a teacher from elsewhere, and many processes asked for."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from children import execute, folder
from conftest import ROOT
from PIL import Image

from xcl.config import rng
from xcl.deploy import meaning_of, pack, pack_network
from xcl.loop import pack_state
from xcl.paper.imagenet import ImagenetParams, ImagenetSection, Waiting
from xcl.photo_transforms import PhotoAugment
from xcl.plan import read_plan
from xcl.runs import Run, ensure
from xcl.teacher_check import TeacherMismatch
from xcl.trainer import Trainer, build

NOTEBOOK = ROOT / 'nbs' / 'imagenet.ipynb'
V2 = 'imagenetv2-threshold0.7', 'imagenetv2-matched-frequency', 'imagenetv2-top-images'


def draw(path, c, i):
    "A photograph of class `c`, which has a colour of its own."
    path.parent.mkdir(parents=True, exist_ok=True)
    x = rng(c, path.parent.name, i).integers(0, 120, (40 + i % 7, 52, 3))
    x[..., c] += 130
    Image.fromarray(x.astype('uint8')).save(path)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Three classes in train/ and val/; and three test folders, named by class number."
    top = tmp_path_factory.mktemp('photos')
    for split, n in ('train', 24), ('val', 16):
        for c, name in enumerate(('red', 'then-green', 'violet')):
            for i in range(n):
                draw(top / split / name / f'{i}.jpeg', c, i)
    for begins in V2:
        for c in range(3):
            for i in range(4):
                draw(top / begins / str(c) / f'{i}.jpeg', c, i)
    return top


def section(photos, **given):
    "A section on the photographs."
    own = dict(dataset='folder', data_dir=str(photos), v2_dir=str(photos), workers=0, rows='KD')
    params = dict(preset='smoke', device='cpu') | own | given
    return ImagenetSection('imagenet', ImagenetParams.of(**params))


@pytest.fixture(scope='module')
def good(photos, tmp_path_factory):
    "A packed network that knows the photographs, and its run."
    path = tmp_path_factory.mktemp('teacher') / 'good.xcl'
    exp = section(photos, rows='ERM', seed=5, budget=0.1, batch=24, micro_batch=24)
    run = ensure(exp.grid['ERM', 5][0], exp.runtime)
    assert run.result['top1'] > 90, run.result
    pack(run, path)
    return path, run


def test_a_packed_teacher_is_checked_and_teaches(photos, good):
    "Its sample says that it is right as configured; it has records like any other."
    path, run = good
    exp = section(photos, teacher='xcl', weights=str(path)).run()
    readings = exp.readings()
    assert readings['top-1 (%)'].idxmax() == 'as configured'
    assert readings.p['as configured'] < 1e-6
    seen = exp.records.pivot(index='row', columns='metric', values='value')
    assert seen.top1['teacher'] == pytest.approx(run.result['top1'])
    assert seen['V2-A']['teacher'] > 90
    assert seen.loc['KD', ['V2-A', 'V2-B', 'V2-C']].notna().all()
    assert ('teacher', 1) not in exp.runs


def test_a_teacher_of_another_order_is_refused(photos, good, tmp_path):
    "The same network, in a folder whose classes are sorted otherwise: 'xx-red' comes last."
    other = tmp_path / 'renamed'
    for split in 'train', 'val':
        for name, new in ('red', 'xx-red'), ('then-green', 'then-green'), ('violet', 'violet'):
            (other / split).mkdir(parents=True, exist_ok=True)
            (other / split / new).symlink_to(photos / split / name)
    exp = section(other, v2_dir='', teacher='xcl', weights=str(good[0]))
    with pytest.raises(TeacherMismatch, match='another order: .*is .* here'):
        exp.check()


def test_two_files_of_weights_are_two_reports(photos, good, tmp_path):
    "Results of one teacher do not replace those of another."
    copy = tmp_path / 'copy.xcl'
    shutil.copy(good[0], copy)
    given = (str(good[0]), str(copy))
    first, second = (section(photos, teacher='xcl', weights=w).check().folder for w in given)
    assert first != second


def test_the_run_is_named_by_what_it_saw(photos):
    "Where a folder lies, and who decodes it, are not in a run's name; its transforms are."
    one, other = section(photos, rows='ERM'), section(photos, rows='ERM', workers=1)
    a, b = (exp.grid['ERM', 1][0] for exp in (one, other))
    assert a.hash == b.hash
    assert str(photos) not in json.dumps(a.to_dict())
    dull = replace(a.data, augment=PhotoAugment(lighting=0.0))
    assert replace(a, data=dull).hash != a.hash


def trained_with_stops(cfg, runtime, stops):
    "State and curve of a run that is resumed after some steps."
    run = Run(cfg, runtime)
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    trainer = Trainer(cfg, run)
    while trainer.step < trainer.steps:
        trainer.train_step()
        if trainer.step % trainer.per_epoch == 0:
            trainer.end_epoch()
        if trainer.step in stops:
            trainer.save()
            trainer.train.shutdown()
            trainer = Trainer(cfg, run)
    trainer.train.shutdown()
    return pack_state(trainer.net, trainer.opt, trainer.track), trainer.curve


@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_resumes_bit_for_bit_although_workers_are_ahead(photos, xcl_home, workers):
    "Batches that were made and never used are made again; who makes them does not matter."
    exp = section(photos, workers=workers, budget=0.01, rows='ERM')
    cfg = exp.grid['ERM', 1][0]
    ends = [trained_with_stops(cfg, exp.runtime, stops) for stops in ((), (1, 4, 5))]
    (a, curve_a), (b, curve_b) = ends
    assert curve_a == curve_b
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_many_processes_are_shown_their_command(xcl_home):
    "The section trains nothing, and writes a plan that can be read."
    P = ImagenetParams.of(preset='smoke', device='cpu', world_size=4, workers=0)
    with pytest.raises(Waiting, match='5 of 5 runs are to be made by 4 processes') as e:
        ImagenetSection('imagenet', P).run()
    assert 'torchrun --standalone --nproc-per-node 4' in str(e.value)
    (plan,) = xcl_home.rglob('plans/*.json')
    wanted = read_plan(plan)
    assert [c.method.name for c in wanted] == ['CutMix', 'ERM', 'KD', 'XCL-Mix', 'XCL-GAN']
    assert not any((xcl_home / folder(c)).exists() for c in wanted)


def test_a_teacher_that_only_guesses_is_refused(photos, tmp_path, xcl_home):
    exp = section(photos, rows='ERM', seed=9)
    cfg = exp.grid['ERM', 9][0]
    network = build(cfg)
    pack_network(network, meaning_of(cfg, network, exp.sets[1]), tmp_path / 'guess.xcl')
    with pytest.raises(TeacherMismatch):
        section(photos, teacher='xcl', weights=str(tmp_path / 'guess.xcl')).run()
    assert not list(xcl_home.rglob('config.json')), 'it has begun to train'


def test_the_notebook_on_a_folder_with_a_teacher_from_elsewhere(photos, good, tmp_path, xcl_home):
    "A user's own folder: photographs stay out of the stored notebook, captions say what they are."
    given = dict(dataset='folder', data_dir=str(photos), v2_dir=str(photos), workers=0)
    given |= dict(preset='smoke', device='cpu', teacher='xcl', weights=str(good[0]), rows='KD')
    done = execute(NOTEBOOK, tmp_path / 'out.ipynb', xcl_home, **given)
    shown = json.dumps([c.outputs for c in done.cells if c.cell_type == 'code'])
    assert 'as configured' in shown
    assert 'Photographs of a folder' in shown and 'SMOKE' in shown and 'V2-C' in shown
    assert (tmp_path / 'xcl_home').exists() and list(
        xcl_home.rglob('reports/imagenet/*/table-1.csv')
    )
    figures = {p.name for p in xcl_home.rglob('figures/**/*.png')}
    assert 'photographs-as-tested-and-as-augmented.png' in figures
