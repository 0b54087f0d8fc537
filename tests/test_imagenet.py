"""Section A.5 across notebooks: a user's folder, a teacher from elsewhere, many processes asked for."""

import json
import re
import shutil
from dataclasses import replace

import papermill
import pytest
import torch
from conftest import ROOT
from PIL import Image

from xcl.config import rng
from xcl.deploy import meaning_of, pack, pack_network
from xcl.launch import read_plan
from xcl.paper.imagenet import ImagenetParams, ImagenetSection
from xcl.photo_transforms import PhotoAugment
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig
from xcl.teacher_check import TeacherMismatch
from xcl.trainer import Trainer, build

NOTEBOOK = ROOT / 'nbs' / 'imagenet.ipynb'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Three classes, each of its own colour; and three test folders, named by class number."
    top = tmp_path_factory.mktemp('photos')

    def draw(path, c, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        x = rng(c, path.parent.name, i).integers(0, 120, (40 + i % 7, 52, 3))
        x[..., c] += 130
        Image.fromarray(x.astype('uint8')).save(path)

    for split, n in ('train', 24), ('val', 16):
        for c, name in enumerate(('red', 'then-green', 'violet')):
            for i in range(n):
                draw(top / split / name / f'{i}.jpeg', c, i)
    for begins in (
        'imagenetv2-threshold0.7',
        'imagenetv2-matched-frequency',
        'imagenetv2-top-images',
    ):
        for c in range(3):
            for i in range(4):
                draw(top / begins / str(c) / f'{i}.jpeg', c, i)
    return top


def section(photos, **given):
    shape = dict(v2_dir=str(photos), workers=0, rows='KD')
    P = ImagenetParams.of(
        preset='smoke', dataset='folder', data_dir=str(photos), device='cpu', **shape | given
    )
    return ImagenetSection('imagenet', P)


@pytest.fixture
def good(photos, tmp_path):
    "A packed network that knows the photographs."
    exp = section(photos, rows='ERM', budget=0.1, batch=24, micro_batch=24)
    run = ensure(exp.student(exp.rows['ERM'], 5), exp.runtime)
    assert run.result['top1'] > 90, run.result
    pack(run, tmp_path / 'good.xcl')
    return tmp_path / 'good.xcl', run


def test_a_packed_teacher_is_checked_and_teaches(photos, good):
    "It is found right as configured, is scored as any other, and its student is a run."
    path, run = good
    exp = section(photos, teacher='xcl', weights=str(path))
    table = exp.readings()
    assert table['top-1 (%)'].idxmax() == 'as configured'
    assert table.p['as configured'] < 1e-6
    seen = exp.run().records.pivot(index='row', columns='metric', values='value')
    assert seen.top1['teacher'] == pytest.approx(run.result['top1'])
    assert seen['V2-A']['teacher'] > 90
    assert seen.loc['KD', ['V2-A', 'V2-B', 'V2-C']].notna().all()


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


def test_the_folder_name_of_a_run_depends_on_its_transforms_but_not_on_paths_and_workers(photos):
    exp, other = section(photos, rows='ERM'), section(photos, rows='ERM', workers=1)
    a, b = (x.student(x.rows['ERM'], 1) for x in (exp, other))
    assert a.hash == b.hash
    assert str(photos) not in json.dumps(a.to_dict())
    dark = replace(a, data=replace(a.data, augment=PhotoAugment(lighting=0.0)))
    assert a.hash != dark.hash


@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_resumes_bit_for_bit_although_workers_are_ahead(photos, workers):
    "Batches that were made and never used are made again; who makes them does not matter."
    exp, ends = section(photos, rows='ERM', workers=workers, budget=0.01), []
    cfg = exp.student(exp.rows['ERM'], 1)
    for stops in (), (1, 4, 5):
        run = Run(cfg, exp.runtime)
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        loop = Trainer(cfg, run)
        while loop.step < loop.steps:
            loop.train_step()
            if loop.step % loop.per_epoch == 0:
                loop.end_epoch()
            if loop.step in stops:
                loop.save()
                loop.train.shutdown()
                loop = Trainer(cfg, run)
        loop.train.shutdown()
        ends.append((loop.net.state_dict(), loop.curve))
    (a, curve_a), (b, curve_b) = ends
    assert curve_a == curve_b
    assert all(torch.equal(a[k], b[k]) for k in a)


def execute(tmp_path, **params):
    return papermill.execute_notebook(
        NOTEBOOK,
        tmp_path / 'out.ipynb',
        dict(preset='smoke', device='cpu', **params),
        kernel_name='python3',
        progress_bar=False,
        execution_timeout=300,
        cwd=tmp_path,
    )


def test_the_notebook_that_wants_many_processes_shows_their_command(tmp_path, xcl_home):
    "It trains nothing, and writes a plan that can be read."
    with pytest.raises(papermill.PapermillExecutionError) as e:
        execute(tmp_path, world_size=4)
    shown = f'{e.value.ename}: {e.value.evalue}'
    assert re.search(r'Waiting: 5 of 5 runs are to be made by 4 processes', shown)
    assert 'torchrun --standalone --nproc-per-node 4' in shown
    (plan,) = xcl_home.rglob('plans/*.json')
    wanted = read_plan(plan)
    assert [c.method.name for c in wanted] == ['CutMix', 'ERM', 'KD', 'XCL-Mix', 'XCL-GAN']
    assert not any(Run(c, RuntimeConfig('cpu')).folder.exists() for c in wanted)


def test_the_notebook_refuses_a_teacher_that_only_guesses(photos, tmp_path, xcl_home):
    exp = section(photos, rows='ERM')
    cfg = exp.student(exp.rows['ERM'], 9)
    network = build(cfg)
    _, val = cfg.data.load(exp.runtime)
    pack_network(network, meaning_of(cfg, network, val), tmp_path / 'guess.xcl')
    own = dict(dataset='folder', data_dir=str(photos), rows='KD', workers=0)
    with pytest.raises(papermill.PapermillExecutionError) as e:
        execute(tmp_path, teacher='xcl', weights=str(tmp_path / 'guess.xcl'), **own)
    assert e.value.ename == 'TeacherMismatch', e.value.evalue
    assert not list(xcl_home.rglob('config.json')), 'a run has begun'


def test_the_notebook_on_a_folder_with_a_teacher_from_elsewhere(photos, good, tmp_path, xcl_home):
    "Photographs of a user stay out of the stored notebook; tables are stored, with their setting."
    own = dict(dataset='folder', data_dir=str(photos), v2_dir=str(photos), rows='KD', workers=0)
    done = execute(tmp_path, teacher='xcl', weights=str(good[0]), **own)
    (cell,) = (c for c in done.cells if 'exp.readings()' in c.source)
    assert 'as configured' in str(cell.outputs)
    (table,) = xcl_home.rglob('table-1.csv')
    text = table.read_text()
    assert 'photographs of a folder' in text
    assert 'SMOKE' in text
    assert 'V2-C' in text
