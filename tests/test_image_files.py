"The lister and opener of image files, and folders of photographs that are read with them."

import io
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from xcl import folder_scan
from xcl.folders import FolderSet, folder_data, folder_report
from xcl.image_files import list_class_images, list_images, open_image
from xcl.runtime import RuntimeConfig

CPU = RuntimeConfig('cpu', workers=0)


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(256, size=(h, w, 3), dtype=np.uint8)


def smooth(h, w):
    "A picture that survives JPEG and shrinking: ramps of three colours."
    y, x = np.mgrid[:h, :w] / max(h, w)
    return (255 * np.stack([x, y, (x + y) / 2], 2)).astype(np.uint8)


@pytest.fixture
def photos(tmp_path):
    "Two classes of JPEGs in train/ and val/."
    for split, n in ('train', 6), ('val', 4):
        for k, name in enumerate(('ant', 'bee')):
            (tmp_path / 'p' / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(smooth(60 + 7 * i, 80 + 11 * k))
                image.save(tmp_path / 'p' / split / name / f'{i}.jpeg', quality=92)
    return tmp_path / 'p'


def load(photos, **kw):
    "Training and validation images of a folder."
    data = folder_data(photos, CPU, size=32, resize=36, **kw)
    return data, *data.load(RuntimeConfig('cpu', workers=0))


# The opener


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'jpeg', 'tif', 'webp'])
def test_every_orientation_is_undone(tmp_path, orientation, suffix):
    "What a camera stores, with its orientation, comes out as the scene was."
    scene = smooth(40, 60)
    a = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: np.rot90(scene),
        7: scene[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(scene, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    kw = dict(jpeg=dict(quality=95), webp=dict(lossless=True)).get(suffix, {})
    Image.fromarray(np.ascontiguousarray(a)).save(tmp_path / f'x.{suffix}', exif=exif, **kw)
    image, size = open_image(tmp_path / f'x.{suffix}')
    assert image.size == size == (60, 40)
    assert abs(np.asarray(image).astype(int) - scene).mean() < (3 if suffix == 'jpeg' else 1e-9)


def test_jpeg_without_exif_is_as_pil_reads_it(tmp_path):
    for i, mode in enumerate(('RGB', 'L', 'CMYK')):
        path = tmp_path / f'{i}.jpg'
        Image.fromarray(noise(50, 70, i)).convert(mode).save(path)
        expected = np.asarray(Image.open(path).convert('RGB'))
        assert np.array_equal(np.asarray(open_image(path)[0]), expected)
        shrunk = Image.open(path)
        shrunk.draft('RGB', (20, 15))
        small, size = open_image(path, lambda w, h: (20, 15))
        assert np.array_equal(np.asarray(small), np.asarray(shrunk.convert('RGB')))
        assert size == (70, 50) and small.size < size


def test_damaged_exif_of_a_whole_image_is_ignored(tmp_path):
    Image.fromarray(noise(8, 9)).save(tmp_path / 'x.png', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    assert np.array_equal(np.asarray(open_image(tmp_path / 'x.png')[0]), noise(8, 9))


@pytest.mark.parametrize('alpha', [0, 1, 128, 254, 255])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_laid_over_grey(tmp_path, alpha, mode):
    grey = noise(6, 5)[..., :1].repeat(3, 2)
    rgba = Image.fromarray(np.dstack([grey, np.full((6, 5), alpha, np.uint8)]))
    rgba.convert(mode).save(tmp_path / 'x.png')
    found = np.asarray(open_image(tmp_path / 'x.png')[0]).astype(float)
    assert abs(found - (grey * (alpha / 255) + 128 * (1 - alpha / 255))).max() <= 1


def test_palette_with_transparency(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    for name in 'x.png', 'x.gif':
        image.save(tmp_path / name, transparency=1)
        assert np.asarray(open_image(tmp_path / name)[0])[0].tolist() == [[10, 20, 30], [128] * 3]


@pytest.mark.parametrize('dtype', ['<u2', '>u2'])
@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_sixteen_bit_grey_in_each_file(tmp_path, dtype, suffix):
    levels = np.array([[0, 128, 129, 256, 257, 32768, 65534, 65535]], np.uint16)
    if suffix == 'pgm':
        (tmp_path / 'x.pgm').write_bytes(b'P5 8 1 65535\n' + levels.astype('>u2').tobytes())
    else:
        Image.fromarray(levels.astype(dtype)).save(tmp_path / f'x.{suffix}')
    found = np.asarray(open_image(tmp_path / f'x.{suffix}')[0])[0, :, 0]
    assert found.tolist() == np.rint(levels[0] / 257).astype(int).tolist()


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\x89PNG\r\n\x1a\n',
        b'GIF89a',
        b'II*\0\xff\xff\xff\xff',
        b'RIFF\0\0\0\0WEBP',
        b'P6 9 9 255\n',
    ],
)
def test_file_that_is_no_image(tmp_path, data):
    (tmp_path / 'x.png').write_bytes(data)
    with pytest.raises(ValueError, match='x.png is damaged.*expected a whole image file'):
        open_image(tmp_path / 'x.png')


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'bmp', 'tif', 'gif'])
def test_truncated_file(tmp_path, suffix):
    out = io.BytesIO()
    Image.fromarray(noise(40, 40)).save(
        out, dict(jpg='JPEG', tif='TIFF').get(suffix, suffix.upper())
    )
    (tmp_path / f'x.{suffix}').write_bytes(out.getvalue()[: len(out.getvalue()) // 2])
    with pytest.raises(ValueError, match=f'x.{suffix} is damaged'):
        open_image(tmp_path / f'x.{suffix}')


# The lister


def test_names_of_programs_belong_to_no_class(photos):
    (photos / 'train' / '.ipynb_checkpoints').mkdir()
    (photos / 'train' / 'ant' / '._0.jpeg').write_bytes(b'x')
    (photos / 'train' / 'ant' / 'Thumbs.db').write_bytes(b'x')
    (photos / 'train' / 'readme.txt').write_bytes(b'x')
    files = list_class_images(photos / 'train')
    assert len(files) == 12 and files.classes == ('ant', 'bee')
    assert files.left_out == ('ant/Thumbs.db', 'readme.txt')
    report = folder_report(photos, CPU)
    assert report.left_out.tolist() == [2, 0] and 'readme.txt' in report.attrs['left_out']


def test_nested_files_are_sorted_and_stable(photos):
    before = list_class_images(photos / 'train').names.tolist()
    assert before == [f'{c}/{i}.jpeg'.encode() for c in ('ant', 'bee') for i in range(6)]
    (photos / 'train' / 'ant' / 'z').mkdir()
    os.replace(photos / 'train' / 'ant' / '0.jpeg', photos / 'train' / 'ant' / 'z' / '0.tiff')
    after = list_class_images(photos / 'train')
    assert after.names[5] == b'ant/z/0.tiff' and after.y.tolist() == [0] * 6 + [1] * 6


def test_loops_of_links_end(photos):
    (photos / 'train' / 'ant' / 'up').symlink_to('..')
    (photos / 'train' / 'ant' / 'self').symlink_to('.')
    assert len(list_images(photos / 'train' / 'ant')) >= 6


@pytest.mark.parametrize('kind', ['FIFO', 'link', 'socket'])
def test_special_files_are_refused_by_both_readers(photos, kind):
    "In a process of its own, so that a reader that hangs fails the test."
    path = photos / 'train' / 'bee' / 'zz.png'
    if kind == 'FIFO':
        os.mkfifo(path)
    if kind == 'link':
        path.symlink_to('nowhere')
    if kind == 'socket':
        import socket

        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind('zz.png')
        os.chdir(here)
    child = multiprocessing.get_context('fork').Process(target=_refuses, args=(photos,))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs and child.exitcode == 0


def _refuses(photos):
    "Exit with 0 where the folder is refused by the name of the file."
    try:
        folder_data(photos, CPU)
    except ValueError as e:
        os._exit(0 if 'zz.png is a' in str(e) else 3)
    os._exit(4)


# Folders of photographs


def test_both_names_of_the_second_split(photos):
    a, _, val = load(photos)
    x = val.take(slice(0, 8)).x
    for name in 'test', 'validation', 'valid':
        (photos / 'val').rename(photos / name)
        b, _, same = load(photos)
        assert b == a and torch.equal(same.take(slice(0, 8)).x, x)
        (photos / name).rename(photos / 'val')


def test_nothing_is_decoded_before_both_splits_are_known(photos, monkeypatch):
    monkeypatch.setattr(folder_scan, 'looked_at', lambda path: pytest.fail('decoded'))
    (photos / 'val' / 'bee').rename(photos / 'val' / 'cow')
    with pytest.raises(ValueError, match='only one split: bee, cow'):
        folder_data(photos, CPU)
    (photos / 'val').rename(photos / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='expected val/ or validation/'):
        folder_data(photos, CPU)


def test_damaged_and_float_files_are_left_out_by_name(photos):
    for i in range(100):
        Image.fromarray(smooth(8, 8)).save(photos / 'train' / 'ant' / f'n{i:03}.png')
    Image.fromarray(np.zeros((9, 9), np.float32)).save(photos / 'train' / 'bee' / 'float.tif')
    report = folder_report(photos, CPU)
    assert list(report.attrs['damaged']) == ['train/bee/float.tif']
    assert 'float pixels' in report.attrs['damaged']['train/bee/float.tif']
    _, train, _ = load(photos)
    assert len(train) == 112


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '{"damaged": []}', '{"damaged": {}}'])
def test_damaged_note_is_named(photos, xcl_home, text):
    data, _, _ = load(photos)
    note = sorted(xcl_home.glob('cache/scan-*.json'))[0]
    whole = json.loads(note.read_text())
    assert set(whole) == {'damaged', 'kinds'}
    note.write_text(text)
    with pytest.raises(ValueError, match=f'{note.name} is .*Remove it'):
        data.load(RuntimeConfig('cpu', workers=0))
    note.unlink()
    assert load(photos)[0] == data


def test_numbers_that_start_at_one_are_plain_names(photos):
    for split in 'train', 'val':
        (photos / split / 'ant').rename(photos / split / '10')
        (photos / split / 'bee').rename(photos / split / '9')
    data, train, _ = load(photos)
    assert train.files.classes == ('9', '10')
    assert data.classes == 2


def test_a_turned_photograph_is_trained_on_upright(photos):
    "The same crops of a file and of its turned copy, decoded at a fraction of the size."
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photos / 'train' / 'ant' / '0.jpeg'
    scene = smooth(300, 400)
    Image.fromarray(scene).save(path, quality=95)
    data, train, _ = load(photos)
    index = torch.tensor([0])
    plain = train.load_batch(index, data.augment, 1, 0, 0)[0], train.take([0]).x
    Image.fromarray(np.ascontiguousarray(np.rot90(scene))).save(path, exif=exif, quality=95)
    turned = FolderSet(list_class_images(photos / 'train'), data, 0)
    assert (turned.load_batch(index, data.augment, 1, 0, 0)[0] - plain[0]).abs().mean() < 0.02
    assert (turned.take([0]).x.int() - plain[1].int()).abs().float().mean() < 3
