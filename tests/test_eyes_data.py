"Eyes from files: errors of a damaged or incomplete MPIIGaze, eyes of a sound one, and the cache."

import os
import shutil

import mpiigaze_fake as fake
import numpy as np
import pytest
import scipy.io
import torch

from xcl import mpiigaze
from xcl.gaze import head_pose_angles, mirror, vector_to_angles
from xcl.gaze_data import EyeData, eye_data, load_eyes, read_eye_npz
from xcl.mpiigaze import read_mpiigaze
from xcl.runtime import RuntimeConfig, register_path

NAN = np.zeros((6, 2))
NAN[4, 0] = np.nan


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    "A sound MPIIGaze of 15 people, and what was written into it."
    root = tmp_path_factory.mktemp('mpiigaze') / 'MPIIGaze'
    return root, fake.write_mpiigaze(root)


@pytest.fixture
def root(original, tmp_path, monkeypatch):
    "A copy to damage; its lists are as long as lists should be."
    monkeypatch.setattr(mpiigaze, 'MPII_PER_SIDE', fake.PER_SIDE)
    return shutil.copytree(original[0], tmp_path / 'MPIIGaze')


def fails(root, *words, error=ValueError, **kwargs):
    "Reading raises `error`, and its message holds all of `words`."
    with pytest.raises(error) as e:
        read_mpiigaze(root, **kwargs)
    missing = [w for w in words if str(w) not in str(e.value)]
    assert not missing, f'{missing} not in: {e.value}'


# A sound folder


def test_reads_everyone_in_the_order_of_the_lists(root, original):
    ex, written = read_mpiigaze(root), original[1]
    assert ex.x.shape == (15 * 4, 1, 36, 60) and ex.x.dtype == torch.uint8
    assert ex.group.tolist() == np.repeat(np.arange(15), 4).tolist()
    for k in 0, 14:
        rows = [
            ('day01', 'left', 2),
            ('day02', 'right', 0),
            ('day01', 'right', 0),
            ('day02', 'left', 0),
        ]
        for j, (day, side, i) in enumerate(rows):
            image, gaze, pose = (
                torch.from_numpy(written[k, day][side][n][i]) for n in ('image', 'gaze', 'pose')
            )
            want = image, vector_to_angles(gaze), head_pose_angles(pose)
            if side == 'right':
                want = mirror(*want)
            got = ex.x[4 * k + j, 0], ex.y[4 * k + j], ex.aux[4 * k + j]
            for a, b in zip(got, want):
                torch.testing.assert_close(a.double(), b.double(), atol=1e-6, rtol=0)


def test_front_door_reads_a_folder(root):
    assert torch.equal(load_eyes(root).x, read_mpiigaze(root).x)


def test_day_of_one_image_on_both_sides(root):
    fake.listing(root, 3).write_text('day02/0000.jpg left\nday02/0000.jpg right\n' * 2)
    assert len(read_mpiigaze(root)) == 60


def test_two_reads_are_equal(root, monkeypatch, tmp_path):
    a = read_mpiigaze(root)
    monkeypatch.setenv('XCL_HOME', str(tmp_path / 'elsewhere'))
    b = read_mpiigaze(root)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.aux, b.aux)


# The cache


@pytest.fixture
def loads(monkeypatch):
    "The MATLAB files that were opened."
    open_, loadmat = [], scipy.io.loadmat
    monkeypatch.setattr(
        scipy.io, 'loadmat', lambda path, **kw: open_.append(path) or loadmat(path, **kw)
    )
    return open_


def test_second_read_opens_no_matlab_file(root, loads):
    a = read_mpiigaze(root)
    assert len(loads) == 30
    b = read_mpiigaze(root)
    assert len(loads) == 30 and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


@pytest.mark.parametrize('what', ['day', 'list', 'time'])
def test_changed_folder_is_read_anew(root, loads, what):
    before, path = read_mpiigaze(root), fake.day(root, 7, 'day01')
    if what == 'day':
        fake.write_day(path, 3, seed=99)
    if what == 'list':
        fake.listing(root, 7).write_text('day01/0001.jpg left\nday01/0001.jpg right\n' * 2)
    if what == 'time':
        os.utime(path, ns=(1, 1))
    after = read_mpiigaze(root)
    assert len(loads) > 30
    changed = [
        k
        for k in range(15)
        if not torch.equal(before.x[before.group == k], after.x[after.group == k])
    ]
    assert changed == ([] if what == 'time' else [7])


def test_cache_of_a_lenient_read_does_not_serve_a_strict_one(root):
    fake.listing(root, 14).unlink()
    assert len(read_mpiigaze(root, strict=False)) == 14 * 4
    fails(root, 'p14', error=FileNotFoundError)


def test_failed_read_leaves_nothing_in_the_cache(root):
    path = fake.day(root, 7, 'day01')
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    fails(root, path)
    path.write_bytes(whole)
    assert len(read_mpiigaze(root)) == 60


# Missing parts


def test_no_folder(tmp_path):
    fails(
        tmp_path / 'nowhere',
        'nowhere',
        'no such folder',
        'Data/Normalized',
        error=FileNotFoundError,
    )


def test_empty_folder(tmp_path):
    fails(tmp_path, tmp_path, 'Data/Normalized', error=FileNotFoundError)


def test_one_level_too_deep(root):
    fails(root / 'Data', 'Data/Normalized', 'It holds', "['Normalized']", error=FileNotFoundError)


def test_no_lists(root):
    shutil.rmtree(root / 'Evaluation Subset')
    fails(root, 'sample list for eye image', error=FileNotFoundError)


@pytest.mark.parametrize('strict', [True, False])
def test_empty_list_folder(root, strict):
    for k in range(15):
        fake.listing(root, k).unlink()
    fails(root, 'p00', 'p14', error=FileNotFoundError, strict=strict)


def test_missing_people_are_named(root):
    for k in 4, 9:
        fake.listing(root, k).unlink()
    fails(root, 'p04, p09', 'strict=False', error=FileNotFoundError)
    assert 4 not in read_mpiigaze(root, strict=False).group.tolist()


def test_missing_day(root):
    fake.day(root, 5, 'day02').unlink()
    fails(root, fake.day(root, 5, 'day02'), 'missing', error=FileNotFoundError)


# Lists


def test_short_list(root):
    fake.listing(root, 2).write_text(
        'day01/0002.jpg left\nday01/0000.jpg right\nday02/0000.jpg right\n'
    )
    fails(root, 'p02', '1 left and 2 right', 'expected 2 of each')
    assert len(read_mpiigaze(root, strict=False)) == 59


@pytest.mark.parametrize('strict', [True, False])
def test_list_without_lines(root, strict):
    fake.listing(root, 2).write_text('\n')
    fails(root, 'p02', strict=strict)


@pytest.mark.parametrize(
    'line', ['day01/0002.jpg', 'day01/0002.jpg middle', '0002.jpg left', 'left', 'day01/ left']
)
def test_list_line_that_is_none(root, line):
    path = fake.listing(root, 2)
    path.write_text(f'{path.read_text()}{line}\n')
    fails(root, path, 'line 5', repr(line))


def test_list_of_windows_line_ends(root):
    path = fake.listing(root, 2)
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    assert len(read_mpiigaze(root)) == 60


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be'])
def test_list_in_utf16(root, encoding):
    path = fake.listing(root, 2)
    path.write_text(path.read_text(), encoding=encoding)
    fails(root, path, 'is UTF-16', 'UTF-8')


def test_list_with_a_byte_order_mark(root):
    path = fake.listing(root, 2)
    path.write_text(path.read_text(), encoding='utf-8-sig')
    assert len(read_mpiigaze(root)) == 60


def test_image_that_the_day_does_not_have(root):
    path = fake.listing(root, 2)
    path.write_text(path.read_text().replace('0002', '0042'))
    fails(root, path, 'day01/0042.jpg', '3 images')


# Days


@pytest.mark.parametrize('keep', [0, 20, 300, 0.5, -1])
def test_truncated_day(root, keep):
    path = fake.day(root, 6, 'day01')
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    fails(root, path)


def test_day_of_rubbish(root):
    path = fake.day(root, 6, 'day01')
    path.write_bytes(b'<html>404</html>' * 100)
    fails(root, path, 'damaged')


def test_day_without_data(root):
    path = fake.day(root, 6, 'day01')
    scipy.io.savemat(path, dict(filenames=np.array(['0000.jpg'], object)))
    fails(root, path, "['data']")


@pytest.mark.parametrize(
    'side, name, array, words',
    [
        ('left', 'image', np.zeros((3, 36, 61), np.uint8), ['(3, 36, 61)', '(3, 36, 60)']),
        ('right', 'image', np.zeros((2, 36, 60), np.uint8), ['(2, 36, 60)', '(3, 36, 60)']),
        ('left', 'image', np.zeros((3, 36, 60)), ['float64', 'uint8']),
        ('right', 'gaze', np.ones((3, 2)), ['(3, 2)', '(3, 3)']),
        ('left', 'pose', np.ones((4, 3)), ['(4, 3)', '(3, 3)']),
        ('left', 'gaze', np.array(['a', 'b', 'c'], object), ['gaze', '(3, 3)']),
    ],
)
def test_wrong_shape_or_type(root, side, name, array, words):
    path = fake.day(root, 1, 'day01')
    fake.write_day(path, 3, **{side: {name: array}})
    fails(root, path, f'data.{side}.{name}', *words)


@pytest.mark.parametrize('name', ['gaze', 'pose'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_label_that_is_not_finite(root, name, value):
    bad = fake.eyes(3)[name].copy()
    bad[2, 1] = value
    fake.write_day(fake.day(root, 1, 'day01'), 3, left={name: bad})
    fails(root, 'p01', 'day01 0002.jpg left', name, str(value))


def test_gaze_that_is_no_direction(root):
    fake.write_day(fake.day(root, 1, 'day01'), 3, left=dict(gaze=np.zeros((3, 3))))
    fails(root, 'p01', 'unit vector')


# One file of arrays


def write_npz(path, n=6, **change):
    "A sound file but for `change`; None leaves an array out."
    g = np.random.default_rng(0)
    a = (
        dict(
            image=g.integers(256, size=(n, 9, 15), dtype=np.uint8),
            gaze=g.normal(0, 0.2, (n, 2)).astype(np.float32),
            pose=g.normal(0, 0.2, (n, 2)).astype(np.float32),
            person=np.arange(n, dtype=np.uint8) % 3,
        )
        | change
    )
    np.savez(path, **{k: v for k, v in a.items() if v is not None})
    return a


def test_npz_is_read_and_resized(tmp_path):
    a = write_npz(tmp_path / 'e.npz')
    ex = load_eyes(tmp_path / 'e.npz')
    assert ex.x.shape == (6, 1, 36, 60) and ex.group.dtype == torch.int64
    assert (
        np.array_equal(ex.y.numpy(), a['gaze'])
        and np.array_equal(ex.aux.numpy(), a['pose'])
        and np.array_equal(ex.group.numpy(), a['person'])
    )
    assert abs(ex.x.float().mean() - a['image'].mean()) < 3


def test_npz_of_full_patches_is_untouched(tmp_path):
    image = np.random.default_rng(1).integers(256, size=(6, 36, 60), dtype=np.uint8)
    write_npz(tmp_path / 'e.npz', image=image)
    assert np.array_equal(read_eye_npz(tmp_path / 'e.npz').x[:, 0].numpy(), image)


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(gaze=None), ["['gaze']", 'person']),
        (dict(image=np.zeros((6, 9, 15))), ['image', 'float64', 'uint8']),
        (dict(image=np.zeros((6, 9, 15, 3), np.uint8)), ['image', '(6, 9, 15, 3)']),
        (dict(image=np.zeros((0, 9, 15), np.uint8)), ['image', '(0, 9, 15)']),
        (dict(image=np.zeros((6, 0, 15), np.uint8)), ['image', '(6, 0, 15)', 'one pixel']),
        (dict(image=np.zeros((6, 9, 0), np.uint8)), ['image', '(6, 9, 0)', 'one pixel']),
        (dict(gaze=np.zeros((5, 2))), ['gaze', '(5, 2)', '(6, 2)']),
        (dict(pose=np.zeros((6, 3))), ['pose', '(6, 3)', '(6, 2)']),
        (dict(person=np.zeros(7, int)), ['person', '(7,)']),
        (dict(person=np.zeros(6)), ['person', 'float64', 'integers']),
        (dict(gaze=NAN), ['gaze[4]', 'nan', 'finite']),
        (dict(pose=np.full((6, 2), 20.0)), ['pose[0]', 'radians']),
    ],
)
def test_npz_that_is_wrong(tmp_path, change, words):
    path = tmp_path / 'e.npz'
    write_npz(path, **change)
    with pytest.raises(ValueError) as e:
        load_eyes(path)
    assert all(w in str(e.value) for w in [str(path), *words]), e.value


@pytest.mark.parametrize('keep', [0, 10, 0.5])
def test_truncated_npz(tmp_path, keep):
    path = tmp_path / 'e.npz'
    write_npz(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match='e.npz is damaged'):
        load_eyes(path)


def test_front_door_refuses_what_is_neither(tmp_path):
    (tmp_path / 'eyes.csv').write_text('1,2\n')
    with pytest.raises(FileNotFoundError, match='a file; allowed: the folder MPIIGaze or an .npz'):
        load_eyes(tmp_path / 'eyes.csv')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        load_eyes(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError):
        read_eye_npz(tmp_path / 'nowhere.npz')


def test_order_and_content_name_the_run(tmp_path):
    "The same eyes in another order are another set, and a changed label is refused."
    a = write_npz(tmp_path / 'e.npz', n=12)
    order = np.r_[1, 0, 2:12]
    np.savez(tmp_path / 'f.npz', **{k: v[order] for k, v in a.items()})
    same, other = (
        eye_data('mpiigaze', str(tmp_path / name), split=1, held_out=1)
        for name in ('e.npz', 'f.npz')
    )
    assert same.hash != other.hash
    train, val = same.load(RuntimeConfig('cpu'))
    assert len(train) + len(val) == 12
    assert not {*train.group.tolist()} & {*val.group.tolist()}
    register_path(same.digest, tmp_path / 'f.npz')
    with pytest.raises(ValueError, match='defined on'):
        same.load(RuntimeConfig('cpu'))


def test_one_person_cannot_be_split(tmp_path):
    write_npz(tmp_path / 'e.npz', person=np.zeros(6, int))
    with pytest.raises(ValueError, match='of 1 people; expected 2 or more'):
        eye_data('mpiigaze', str(tmp_path / 'e.npz'), split=1)
    with pytest.raises(ValueError, match='per_person is -1'):
        EyeData('procedural', split=1, per_person=-1)
