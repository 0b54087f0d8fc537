"""Section A.5 across notebooks: a folder of a user's own, a teacher from elsewhere, and many processes asked for."""

import json
import re
import shutil
from types import SimpleNamespace

import papermill
import pytest
import torch
from children import folder
from conftest import ROOT
from PIL import Image

from xcl import imagenet
from xcl.config import rng
from xcl.deploy import meaning_of, pack, pack_network
from xcl.launch import read_plan
from xcl.photo_transforms import PhotoAugment
from xcl.runs import Run, ensure
from xcl.teacher_check import TeacherMismatch
from xcl.train import IMAGENET_ROWS, Trainer, pack_state

NOTEBOOK = ROOT / 'nbs' / 'imagenet.ipynb'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Photographs that are easy to tell apart: three classes, each of its own colour; and three test folders, named by class number."
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
    plain = dict(
        imagenet.PRESETS['smoke'],
        dataset='folder',
        data_dir=str(photos),
        v2_dir=str(photos),
        weights='',
        generator='',
        workers=0,
        world_size=1,
        device='cpu',
        preset='smoke',
        seed=1,
        changed={},
        rows='KD',
    )
    return imagenet.section(SimpleNamespace(**plain | given))


@pytest.fixture
def good(photos, tmp_path):
    "A packed network that knows the photographs."
    S = section(photos)
    cfg = imagenet.imagenet_run(
        'ERM', S.data, 5, 0.1, (('depth', 10), ('width', 16)), batch=24, part=24
    )
    run = ensure(cfg, S.runtime)
    assert run.result['top1'] > 90, run.result
    pack(run, tmp_path / 'good.xcl')
    return tmp_path / 'good.xcl', run


def test_a_packed_teacher_is_checked_and_teaches(photos, good):
    "Its sample says that it is right as configured; it has a record like any other; its student is a run."
    path, run = good
    S = section(photos, teacher='xcl', weights=str(path))
    teacher = imagenet.taught_by(S)
    table = imagenet.checked_teacher(S, teacher)
    assert table['top-1 (%)'].idxmax() == 'as configured' and table.p['as configured'] < 1e-6
    runs = imagenet.run_all(S, {('KD', 1): imagenet.student(S, 'KD', 1, teacher, {})})
    seen = imagenet.records_of(S, teacher, runs).pivot(
        index='method', columns='metric', values='value'
    )
    assert (
        seen.top1['teacher'] == pytest.approx(run.result['top1']) and seen['V2-A']['teacher'] > 90
    )
    assert seen.loc['KD', ['V2-A', 'V2-B', 'V2-C']].notna().all()


def test_a_teacher_of_another_order_is_refused(photos, good, tmp_path):
    "The same network, in a folder whose classes are sorted otherwise: 'xx-red' comes last."
    other = tmp_path / 'renamed'
    for split in 'train', 'val':
        for name, new in ('red', 'xx-red'), ('then-green', 'then-green'), ('violet', 'violet'):
            (other / split).mkdir(parents=True, exist_ok=True)
            (other / split / new).symlink_to(photos / split / name)
    S = section(other, v2_dir='', teacher='xcl', weights=str(good[0]))
    with pytest.raises(TeacherMismatch, match='another order: .*is .* here'):
        imagenet.checked_teacher(S, imagenet.taught_by(S))


def test_the_run_is_named_by_what_it_saw(photos, good):
    "Where a folder lies, and who decodes it, are not in a run's name; its transforms are."
    S, T = section(photos), section(photos, workers=1)
    a, b = (imagenet.student(x, 'ERM', 1, (), {}) for x in (S, T))
    assert a.hash == b.hash and str(photos) not in json.dumps(a.to_dict())
    assert (
        a.hash
        != imagenet.imagenet_run(
            'ERM', imagenet.replace(S.data, augment=PhotoAugment(lighting=0.0)), 1, 0.1, ()
        ).hash
    )
    assert set(IMAGENET_ROWS) < set(imagenet.ROWS)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_resumes_bit_for_bit_although_workers_are_ahead(photos, xcl_home, workers):
    "Batches that were made and never used are made again; who makes them does not matter."
    S, ends = section(photos, workers=workers, budget=0.01), []
    cfg = imagenet.student(S, 'ERM', 1, (), {})
    for stops in (), (1, 4, 5):
        run = Run(cfg, S.runtime)
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
        ends.append((pack_state(loop.net, loop.opt, loop.track), loop.curve))
    (a, curve_a), (b, curve_b) = ends
    assert curve_a == curve_b and all(torch.equal(a[k], b[k]) for k in a)


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
    said = f'{e.value.ename}: {e.value.evalue}'
    assert (
        re.search(r'Waiting: 5 of 5 runs are to be made by 4 processes', said)
        and 'torchrun --standalone --nproc-per-node 4' in said
    )
    (plan,) = xcl_home.rglob('plans/*.json')
    wanted = read_plan(plan)
    assert [c.method.name for c in wanted] == [
        'CutMix',
        'ERM',
        'KD',
        'XCL-Mix',
        'XCL-GAN',
    ] and not any((xcl_home / folder(c)).exists() for c in wanted)


def test_the_notebook_refuses_a_teacher_that_only_guesses(photos, tmp_path, xcl_home):
    S = section(photos)
    cfg = imagenet.student(S, 'ERM', 9, (), {})
    net = imagenet.build(cfg)
    pack_network(net, meaning_of(cfg, net, S.val), tmp_path / 'guess.xcl')
    with pytest.raises(papermill.PapermillExecutionError) as e:
        execute(
            tmp_path,
            dataset='folder',
            data_dir=str(photos),
            teacher='xcl',
            weights=str(tmp_path / 'guess.xcl'),
            rows='KD',
            workers=0,
        )
    assert e.value.ename == 'TeacherMismatch', e.value.evalue
    assert not list(xcl_home.rglob('config.json')), 'it has begun to train'


def test_the_notebook_on_a_folder_with_a_teacher_from_elsewhere(photos, good, tmp_path, xcl_home):
    "A user's own folder: photographs stay out of the stored notebook, and reports say what they were made of."
    done = execute(
        tmp_path,
        dataset='folder',
        data_dir=str(photos),
        v2_dir=str(photos),
        teacher='xcl',
        weights=str(good[0]),
        rows='KD',
        workers=0,
    )
    assert [
        c
        for c in done.cells
        if c.cell_type == 'code' and 'checked_teacher' in c.source and c.outputs
    ]
    (table,) = xcl_home.rglob('reports/**/*-table.csv')
    text = table.read_text()
    assert 'photographs of a folder' in text and 'SMOKE' in text and 'V2-C' in text
