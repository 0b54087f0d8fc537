"""Sections on gaze, GANs, refinement and ImageNet: refused before anything trains, and small runs."""

import numpy as np
import pytest
import torch
from PIL import Image

from xcl.likelihoods import Gaussian, Point
from xcl.paper.gan import GanParams, GanSection
from xcl.paper.gaze import GazeParams, GazeSection
from xcl.paper.imagenet import ImagenetParams, ImagenetSection
from xcl.paper.params import ParameterError
from xcl.paper.row import Row
from xcl.paper.simgan import SimganParams, SimganSection
from xcl.transfer import MixUp

KINDS = dict(
    gaze=(GazeSection, GazeParams, dict(seeds=1, per_person=8, members=1)),
    gan=(GanSection, GanParams, dict(seeds=1, width=4, members=1, per_person=8)),
    simgan=(SimganSection, SimganParams, {}),
    imagenet=(ImagenetSection, ImagenetParams, dict(workers=0, drawn=4)),
)


def section(name, **given):
    "A small section of the preset smoke."
    kind, params, small = KINDS[name]
    return kind(name, params.of(**dict(preset='smoke', device='cpu') | small | given))


def eyes_file(path, n=64, shape=(36, 60)):
    "An .npz of unlabelled eyes."
    g = np.random.default_rng(0)
    np.savez(path, image=g.integers(0, 256, (n, *shape), dtype=np.uint8))
    return str(path)


def labelled_file(path, people=6, each=20):
    "An .npz of labelled eyes."
    g, n = np.random.default_rng(1), people * each
    image = g.integers(0, 256, (n, 36, 60), dtype=np.uint8)
    gaze, pose = (g.uniform(-0.3, 0.3, (n, 2)).astype(np.float32) for _ in range(2))
    np.savez(path, image=image, gaze=gaze, pose=pose, person=np.repeat(np.arange(people), each))
    return str(path)


def class_folders(top, splits=('train', 'val'), classes=3, each=12, side=40):
    "A folder of JPEGs in class folders."
    g = np.random.default_rng(2)
    for split in splits:
        for c in range(classes):
            folder = top / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(each):
                x = g.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(x).save(folder / f'{i}.jpeg')
    return str(top)


def runs_of(home):
    "Folders of runs that were begun."
    return [p.parent.name for p in home.rglob('config.json')]


def refused(exp, message, home, error=(ParameterError, OSError, ValueError)):
    "The section refuses, and has begun no run."
    with pytest.raises(error, match=message):
        exp.run()
    assert not runs_of(home), 'a run was begun before the refusal'


@pytest.mark.parametrize(
    'name, given, message',
    [
        ('gaze', dict(per_person=1), 'per_person is 1'),
        ('gaze', dict(eye_batch=4096), 'eye_batch is 4096; the target domain'),
        ('gaze', dict(per_person=400, generated=8), 'generated is 8'),
        ('gaze', dict(unlabelled='/nonexistent.npz'), '/nonexistent.npz'),
        ('gaze', dict(dataset='mpiigaze', data_dir='/nonexistent'), '/nonexistent'),
        ('gan', dict(share=1.0, generated=64), 'generated is 64; a batch of 128 takes 128'),
        ('gan', dict(eyes_dir='/nonexistent'), '/nonexistent'),
        ('gan', dict(per_person=1, eye_batch=16), 'eye_batch is 16; the target domain'),
        ('gan', dict(generated_eyes=1), 'generated_eyes is 1'),
        ('gan', dict(train_size=20), 'train_size is 20'),
        ('gan', dict(train_size=100), '100 training examples make no batch of 128'),
        ('simgan', dict(dataset='real', data_dir='/nonexistent.npz'), '/nonexistent.npz'),
        ('simgan', dict(eye_batch=4096), 'eye_batch is 4096'),
        ('imagenet', dict(v2_dir='/nonexistent'), "v2_dir is '/nonexistent'"),
        ('imagenet', dict(dataset='folder', data_dir='/nonexistent'), '/nonexistent'),
        ('imagenet', dict(generator='nowhere:make'), 'nowhere'),
        ('imagenet', dict(generated=4), 'generated is 4; a batch of 32'),
        ('imagenet', dict(teacher='xcl', weights='/nonexistent.xcl'), '/nonexistent.xcl'),
        ('imagenet', dict(teacher='resnet152e', weights='x.pth'), 'resnet152e'),
    ],
)
def test_refused_before_anything_trains(name, given, message, xcl_home):
    refused(section(name, **given), message, xcl_home)


@pytest.mark.parametrize(
    'name, given, message',
    [
        ('gaze', dict(dataset='mpiigaze'), 'data_dir'),
        ('gaze', dict(data_dir='eyes.npz'), 'data_dir'),
        ('gaze', dict(rows='ERM, XCL'), 'rows is'),
        ('gaze', dict(lam=-1), 'lam is -1'),
        ('gan', dict(gan='biggan'), 'digits with digits'),
        ('gan', dict(share=1.01), 'share is 1.01'),
        ('gan', dict(eye_batch=1), 'eye_batch is 1'),
        ('simgan', dict(lams=''), 'lams is'),
        ('simgan', dict(lams='1 1'), 'lams is'),
        ('simgan', dict(data_dir='eyes.npz'), 'data_dir'),
        ('imagenet', dict(weights='x.pth'), 'weights is'),
        ('imagenet', dict(micro_batch=5), 'micro_batch is 5'),
        ('imagenet', dict(size=40), 'up to resize'),
        ('imagenet', dict(dataset='folder'), 'data_dir'),
        ('imagenet', dict(drawn=2), 'drawn is 2'),
    ],
)
def test_parameters_that_do_not_fit(name, given, message):
    with pytest.raises(ParameterError, match=message):
        section(name, **given)


def test_eyes_of_another_size_and_a_text_are_refused(tmp_path, xcl_home):
    other = eyes_file(tmp_path / 'other.npz', shape=(30, 50))
    text = tmp_path / 'text.npz'
    text.write_text('no array')
    for path, message in ((other, 'image is uint8'), (str(text), 'damaged')):
        refused(section('gaze', unlabelled=path), message, xcl_home)
        refused(section('simgan', dataset='real', data_dir=path), message, xcl_home)


def test_a_folder_without_val_is_refused_before_train_is_decoded(tmp_path, xcl_home):
    top = class_folders(tmp_path / 'photos', splits=('train',))
    refused(section('imagenet', dataset='folder', data_dir=top), 'val', xcl_home)
    assert not list(xcl_home.rglob('scan-*.json')), 'train/ was decoded first'


def test_v2_of_other_classes_is_refused(tmp_path, xcl_home):
    top = class_folders(tmp_path / 'photos')
    two = class_folders(tmp_path / 'v2', splits=('imagenetv2-top-images',), classes=2)
    for c in range(2):
        folder = tmp_path / 'v2' / 'imagenetv2-top-images'
        (folder / f'class{c}').rename(folder / str(c))
    exp = section('imagenet', dataset='folder', data_dir=top, v2_dir=two, rows='ERM')
    refused(exp, 'class folders', xcl_home)


def test_one_syntax_of_rows():
    "Commas or spaces, in every section that has rows."
    for text in 'ERM, KD', 'ERM KD', 'ERM,KD':
        for name in 'gaze', 'gan', 'imagenet':
            assert section(name, rows=text).rows.names == ['ERM', 'KD']


def test_gaze_on_a_file_with_eyes_from_elsewhere(tmp_path):
    "Labelled and unlabelled eyes in files: found by digest, private, one SimGAN for all seeds."
    data = labelled_file(tmp_path / 'labelled.npz')
    more = eyes_file(tmp_path / 'unlabelled.npz')
    given = dict(dataset='mpiigaze', data_dir=data, unlabelled=more, per_person=0)
    exp = section('gaze', seeds=2, rows='ERM, point, KD, XCL-GAN', **given).run()
    assert exp.gan(1) == exp.gan(2)
    assert exp.private
    assert exp.student(exp.rows['ERM, point'], 1).likelihood == Point(2)
    assert exp.student(exp.rows['KD'], 1).likelihood == Gaussian(2)
    assert set(exp.records.row) == {'ERM, point', 'KD', 'XCL-GAN', 'teacher'}
    assert data not in str(exp.grid['KD', 1][0].to_dict())


def test_a_row_of_ones_own_is_trained():
    own = Row('Mine', MixUp(per_sample=True), colour='C8')
    P = GazeParams.of(preset='smoke', device='cpu', seeds=1, per_person=8, members=1)
    exp = GazeSection('gaze', P, [P.rows['ERM'], own]).run()
    assert exp.names == ['ERM', 'Mine', 'teacher']
    assert exp.table().query('row == "Mine"')['mean'].notna().any()


def test_simgan_measures_what_it_refines():
    exp = section('simgan').run()
    found = exp.measured
    assert found['rendered']['moved_deg'] == pytest.approx(0, abs=1e-4)
    assert all(found[row.name]['moved_deg'] > 0 for row in exp.rows)
    assert len(exp.summary()) == 3
    one = torch.from_numpy(exp.eyes['λ = 1']['x'])
    assert not torch.equal(one, torch.from_numpy(exp.eyes['rendered']['x']))


def test_sections_of_other_parameters_have_other_folders():
    "lam 1 and lam 50 of gaze overwrote each other; so did two teachers' weights."
    folders = {section('gaze', lam=lam, rows='ERM').check().folder for lam in (1.0, 50.0)}
    assert len(folders) == 2
