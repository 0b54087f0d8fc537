"Images from files: each layout written small, read back, and damaged in each way that we know of."

import io
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from xcl import image_sources, images
from xcl.data import CropFlip
from xcl.images import ImageData, class_names, image_data, image_set
from xcl.runtime import RuntimeConfig

CLASSES, TRAIN, TEST = 3, 12, 6  # of the small stand-in for CIFAR-100
NAMES = ['apple', 'aquarium_fish', 'baby']


def pixels(n, seed=0, size=32):
    return np.random.default_rng(seed).integers(256, size=(n, size, size, 3), dtype=np.uint8)


SPLITS = dict(
    train=(pixels(TRAIN, 1), np.arange(TRAIN) % CLASSES),
    test=(pixels(TEST, 2), np.arange(TEST) % CLASSES),
)


def encoded(image, kind='PNG', **kw):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **kw)
    return out.getvalue()


def write_shard(path, x, y, image='img', label='fine_label', meta=None, kind='WEBP', cells=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = cells or [
        dict(bytes=encoded(o, kind, **dict(lossless=True) if kind == 'WEBP' else {}), path=None)
        for o in x
    ]
    pq.write_table(
        pa.table({image: cells, label: list(y)}).replace_schema_metadata(
            meta or {'fine_label_names': '\n'.join(NAMES)}
        ),
        path,
    )
    return path


def write_parquet(root, shards=2, **kw):
    for split, (x, y) in SPLITS.items():
        n = shards if split == 'train' else 1
        for i, (a, b) in enumerate(zip(np.split(x, n), np.split(y, n))):
            write_shard(root / f'{split}-{i:05}-of-{n:05}.parquet', a, b, **kw)
    return root


def write_pickles(root, mp, **change):
    "torchvision's folder, and a table of md5s that fits; `change` is for the training batch."
    folder = root / 'cifar-100-python'
    folder.mkdir(parents=True)
    flat = {
        k: dict(data=x.transpose(0, 3, 1, 2).reshape(len(x), -1), fine_labels=y.tolist())
        for k, (x, y) in SPLITS.items()
    }
    flat['train'] |= change
    for k, v in (flat | dict(meta=dict(fine_label_names=NAMES))).items():
        (folder / k).write_bytes(pickle.dumps(v))
    md5 = lambda k: image_sources._md5(folder / k)
    known = SimpleNamespace(
        train_list=[['train', md5('train')]],
        test_list=[['test', md5('test')]],
        meta=dict(filename='meta', key='fine_label_names', md5=md5('meta')),
    )
    for module in image_sources, images:
        mp.setattr(module, 'torchvision_set', lambda source: known)
    return folder


def write_folders(root, test='test', kind='PNG', size=None):
    for split, (x, y) in SPLITS.items():
        for i, (image, k) in enumerate(zip(x, y)):
            path = (
                root / (test if split == 'test' else 'train') / NAMES[k] / f'{i:03}.{kind.lower()}'
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image[:size, :size], kind))
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "CIFAR with a dozen images."
    for source in 'cifar10', 'cifar100':
        monkeypatch.setitem(image_sources.CIFAR, source, (CLASSES, TRAIN, TEST))


def fails(f, *words, error=ValueError):
    "f() raises `error`, and its message holds all of `words`."
    with pytest.raises(error) as e:
        f()
    missing = [w for w in words if str(w) not in str(e.value)]
    assert not missing, f'{missing} not in: {e.value}'


def reads(root, *words, source='cifar100', **kw):
    fails(lambda: image_set(source, root), *words, **kw)


def same(found):
    "The set holds what SPLITS holds, in any order within a split."
    for ex, (x, y) in zip(found[:2], SPLITS.values()):
        assert (
            ex.x.dtype == torch.uint8
            and ex.y.dtype == torch.int64
            and ex.x.shape == (len(x), 3, 32, 32)
        )
        rows = lambda x, y: sorted((o.tobytes(), int(k)) for o, k in zip(x, y))
        assert rows(np.ascontiguousarray(ex.x.numpy().transpose(0, 2, 3, 1)), ex.y) == rows(x, y)
    assert found.names == tuple(NAMES)


# Sound sources


@pytest.mark.parametrize('below', ['', 'data', 'cifar100', 'cifar100/data', 'plain_text'])
def test_parquet_in_each_place(tmp_path, below):
    write_parquet(tmp_path / 'd' / below)
    found = image_set('cifar100', tmp_path / 'd')
    same(found)
    assert np.array_equal(
        found.train.x.numpy(), SPLITS['train'][0].transpose(0, 3, 1, 2)
    )  # in the order of the file


@pytest.mark.parametrize(
    'kw', [dict(image='image', label='label', kind='PNG'), dict(image='img', label='label')]
)
def test_parquet_with_other_columns(tmp_path, kw):
    features = {kw['label']: dict(names=NAMES, _type='ClassLabel')}
    write_parquet(
        tmp_path / 'd', meta={'huggingface': json.dumps(dict(info=dict(features=features)))}, **kw
    )
    for source in 'cifar100', 'cifar10':
        same(image_set(source, tmp_path / 'd'))


def test_class_without_a_name_is_called_by_its_number(tmp_path):
    write_parquet(tmp_path / 'd', meta={'other': 'x'})
    assert class_names('cifar100', tmp_path / 'd') == ('0', '1', '2')


def test_pickles(tmp_path, monkeypatch):
    folder = write_pickles(tmp_path / 'd', monkeypatch)
    for d in folder, folder.parent:
        same(image_set('cifar100', d))


@pytest.mark.parametrize('source', ['cifar100', 'folder'])
@pytest.mark.parametrize('test', ['test', 'val'])
def test_class_folders(tmp_path, source, test):
    same(image_set(source, write_folders(tmp_path / 'd', test)))


def test_all_layouts_of_one_set_give_one_normalisation(tmp_path, monkeypatch):
    write_pickles(tmp_path / 'a', monkeypatch)
    write_parquet(tmp_path / 'b')
    write_folders(tmp_path / 'c')
    a, b, c = (image_data('cifar100', tmp_path / d) for d in 'abc')
    assert a == b and (a.mean, a.std) == (
        c.mean,
        c.std,
    )  # class folders hold the images in another order: another digest
    assert a.digest != c.digest


def test_other_modes_and_files_in_class_folders(tmp_path):
    d = write_folders(tmp_path / 'd')
    (d / 'train' / 'notes.txt').write_text('x')
    (d / 'train' / 'baby' / '.DS_Store').write_text('x')
    before = len(image_set('folder', d).train)
    Image.fromarray(pixels(1)[0]).convert('L').save(d / 'train' / 'baby' / 'grey.PNG')
    Image.fromarray(pixels(1)[0]).convert('P').save(d / 'train' / 'baby' / 'palette.png')
    Image.fromarray(pixels(1)[0]).save(d / 'train' / 'baby' / 'photo.JPEG')
    found = image_set('folder', d)
    assert len(found.train) == before + 3
    grey = found.train.x[
        [i for i in range(len(found.train)) if (found.train.x[i, 0] == found.train.x[i, 2]).all()]
    ]
    assert len(grey) == 1


def test_nested_folders_other_suffixes_and_strays(tmp_path):
    "Everything that ImageFolder reads is read; what is left out is counted."
    d = write_folders(tmp_path / 'd')
    image = Image.fromarray(pixels(1)[0])
    (d / 'train' / 'baby' / 'a' / 'b').mkdir(parents=True)
    for i, suffix in enumerate(('tif', 'TIFF', 'bmp', 'ppm', 'pgm', 'gif', 'webp')):
        image.convert('L').save(d / 'train' / 'baby' / 'a' / ('b' * (i % 2)) / f'x.{suffix}')
    (d / 'train' / '.ipynb_checkpoints').mkdir()
    image.save(d / 'train' / '.ipynb_checkpoints' / 'x.png')
    (d / 'train' / 'baby' / '._000.png').write_bytes(b'resource fork')
    (d / 'train' / 'baby' / 'labels.csv').write_text('x')
    found = image_set('folder', d)
    assert len(found.train) == TRAIN + 7 and found.names == tuple(NAMES)
    assert found.left_out == '1 other files: baby/labels.csv'


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path):
    d = write_folders(tmp_path / 'd')
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(d / 'train' / 'baby' / 'zz.png')
    x = image_set('folder', d).train.x[-1].float()
    assert abs(x.mean() - 127.5) < 0.5 and x.min() == 0 and x.max() == 255
    Image.fromarray(ramp / np.float32(65535)).save(d / 'train' / 'baby' / 'zz.tif')
    reads(d, 'zz.tif', 'float pixels', '8 or 16 bits', source='folder')


def test_transparent_pixels_are_grey(tmp_path):
    d = write_folders(tmp_path / 'd')
    rgba = np.dstack([pixels(1)[0], np.zeros((32, 32), np.uint8)])
    rgba[:16, :, 3] = 255
    Image.fromarray(rgba).save(d / 'train' / 'baby' / 'zz.png')
    x = image_set('folder', d).train.x[-1]
    assert (x[:, 16:] == 128).all()
    assert np.array_equal(x[:, :16].numpy(), rgba[:16, :, :3].transpose(2, 0, 1))


def test_portrait_is_read_upright(tmp_path):
    d = write_folders(tmp_path / 'd')
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(pixels(1)[0]).save(d / 'train' / 'baby' / 'zz.png', exif=exif)
    x = image_set('folder', d).train.x[-1].permute(1, 2, 0).numpy()
    assert np.array_equal(x, np.rot90(pixels(1)[0]))


def test_pipe_is_refused_and_does_not_hang(tmp_path):
    d = write_folders(tmp_path / 'd')
    os.mkfifo(d / 'train' / 'baby' / 'pipe.png')
    reads(d, 'pipe.png is a FIFO', source='folder')


def test_bomb_is_refused_by_name(tmp_path, monkeypatch):
    d = write_folders(tmp_path / 'd')
    Image.new('RGB', (90, 90)).save(d / 'train' / 'baby' / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    reads(d, 'bomb.png is refused', 'at most 2 x 2,000 pixels', source='folder')


def test_folders_numbered_from_one(tmp_path):
    d = tmp_path / 'd'
    for split in 'train', 'val':
        for name in '1', '2', '10':
            (d / split / name).mkdir(parents=True)
            (d / split / name / 'x.png').write_bytes(
                encoded(np.full((9, 9, 3), int(name), 'uint8'))
            )
    found = image_set('folder', d, 9)
    assert found.names == ('1', '2', '10')
    assert found.train.x[:, 0, 0, 0].tolist() == [1, 2, 10] and found.train.y.tolist() == [0, 1, 2]


def test_class_folder_that_is_no_utf8(tmp_path):
    d = write_folders(tmp_path / 'd')
    os.mkdir(os.fsencode(d / 'train') + b'/caf\xe9')
    reads(d, 'caf\\xe9', 'not UTF-8', source='folder')


# The cache


def test_second_read_decodes_nothing(tmp_path, monkeypatch):
    d = write_parquet(tmp_path / 'd')
    first = image_set('cifar100', d)
    images._image_set.cache_clear()
    monkeypatch.setattr(image_sources, 'read_shard', lambda *_: pytest.fail('decoded again'))
    second = image_set('cifar100', d)
    assert (
        second is not first
        and second.digest == first.digest
        and torch.equal(second.train.x, first.train.x)
    )


def test_changed_source_is_read_anew_and_refused_by_the_run(tmp_path):
    d = write_parquet(tmp_path / 'd')
    config, runtime = image_data('cifar100', d), RuntimeConfig('cpu')
    config.load(runtime)
    x, y = SPLITS['test']
    write_shard(d / 'test-00000-of-00001.parquet', 255 - x, y)
    fails(lambda: config.load(runtime), config.digest, image_set('cifar100', d).digest)


def test_touched_source_is_the_same_data(tmp_path):
    d = write_parquet(tmp_path / 'd')
    config = image_data('cifar100', d)
    os.utime(d / 'test-00000-of-00001.parquet', ns=(1, 1))
    assert image_data('cifar100', d) == config


def test_failed_read_leaves_nothing_in_the_cache(tmp_path, xcl_home):
    d = write_parquet(tmp_path / 'd')
    path = d / 'train-00001-of-00002.parquet'
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    reads(d, path)
    assert not list(xcl_home.rglob('*.safetensors'))
    path.write_bytes(whole)
    same(image_set('cifar100', d))


# Missing parts


@pytest.mark.parametrize('source', ['cifar10', 'cifar100', 'folder'])
@pytest.mark.parametrize('d', ['', 'nowhere'])
def test_no_folder(source, d):
    reads(d, source, repr(d), 'expected a folder', source=source, error=FileNotFoundError)


def test_folder_with_something_else(tmp_path):
    (tmp_path / 'd').mkdir()
    reads(
        tmp_path / 'd',
        'holds nothing',
        'cifar-100-python/',
        'train-*.parquet',
        'train/*.parquet',
        'train/<class>/',
        error=FileNotFoundError,
    )
    for i in range(12):
        (tmp_path / 'd' / f'{i:02}.tar').touch()
    reads(tmp_path / 'd', '00.tar', 'and 4 more', error=FileNotFoundError)


def test_folder_source_takes_parquet(tmp_path):
    found = image_set('folder', write_parquet(tmp_path / 'd'), 16)
    assert found.names == tuple(NAMES) and found.train.x.shape == (TRAIN, 3, 16, 16)
    assert found.train.y.tolist() == SPLITS['train'][1].tolist()


def test_class_folders_come_before_parquet_for_folder(tmp_path):
    d = write_folders(write_parquet(tmp_path / 'd'))
    for split in 'train', 'test':
        (d / split / 'baby' / 'one_more.png').write_bytes(encoded(pixels(1)[0]))
    assert len(image_set('folder', d).train) == TRAIN + 1
    assert len(image_set('cifar100', d).train) == TRAIN


def convert(root, split_names=('train', 'test'), shards=2, **kw):
    "The layout of Hugging Face's converter: a folder for each split, shards numbered from 0."
    for split, (x, y) in zip(split_names, SPLITS.values()):
        n = shards if split == 'train' else 1
        for i, (a, b) in enumerate(zip(np.split(x, n), np.split(y, n))):
            write_shard(root / split / f'{i:04}.parquet', a, b, **kw)
    return root


@pytest.mark.parametrize('below', ['', 'cifar100', 'plain_text', 'cifar100/plain_text'])
def test_converted_parquet(tmp_path, below):
    convert(tmp_path / 'd' / below)
    same(image_set('cifar100', tmp_path / 'd'))


def test_converted_parquet_lacks_a_shard(tmp_path):
    d = convert(tmp_path / 'd', shards=3)
    (d / 'train' / '0001.parquet').unlink()
    reads(d, 'lacks 0001.parquet', error=FileNotFoundError)


def test_own_parquet_without_names(tmp_path):
    d = convert(tmp_path / 'd', ('train', 'validation'), meta={'other': 'x'}, label='label')
    found = image_set('folder', d)
    assert found.names == ('0', '1', '2') and len(found.test) == TEST


@pytest.mark.parametrize(
    'kw, words',
    [
        (dict(meta={'huggingface': '{"info": [1, 2'}), ['metadata', 'cannot be read']),
        (dict(meta={'huggingface': '{"info": [1, 2]}'}), ['metadata', 'cannot be read']),
        (dict(meta={'fine_label_names': b'\xff\xfe'}), ['metadata', 'UTF-8']),
        (
            dict(meta={'huggingface': '{"info": {"features": {"fine_label": {"names": "a"}}}}'}),
            ['class names', 'list of strings'],
        ),
    ],
)
def test_metadata_that_is_broken(tmp_path, kw, words):
    d = convert(tmp_path / 'd', **kw)
    for source in 'cifar100', 'folder':
        reads(d, d / 'train' / '0000.parquet', *words, source=source)


@pytest.mark.parametrize('label', [2**62, 2**31, -(2**40)])
def test_label_that_is_huge(tmp_path, label):
    d = convert(tmp_path / 'd', meta={'other': 'x'})
    x, y = SPLITS['test']
    write_shard(d / 'test' / '0000.parquet', x, [*y[:-1].tolist(), label])
    reads(d, 'test', 'row 5', label, 'expected a class')
    x, y = SPLITS['train']
    write_shard(d / 'train' / '0001.parquet', x[6:], [*y[6:-1].tolist(), label])
    reads(d, d / 'train', label, 'expected integers 0 to', source='folder')


@pytest.mark.parametrize(
    'split, name', [('train', 'train-00001-of-00002.parquet'), ('test', 'test-*.parquet')]
)
def test_missing_shard(tmp_path, split, name):
    d = write_parquet(tmp_path / 'd')
    sorted(d.glob(f'{split}-*'))[-1].unlink()
    reads(d, d, name, error=FileNotFoundError)


def test_missing_test_folder(tmp_path):
    d = write_folders(tmp_path / 'd')
    shutil.rmtree(d / 'test')
    reads(d, d, 'test/ or val/', source='folder', error=FileNotFoundError)


@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
def test_missing_pickle(tmp_path, monkeypatch, name):
    folder = write_pickles(tmp_path / 'd', monkeypatch)
    (folder / name).unlink()
    reads(folder, folder / name, 'no such file', error=FileNotFoundError)


def test_prefix_is_not_a_set(tmp_path, monkeypatch):
    x, y = SPLITS['train']
    d = write_parquet(tmp_path / 'd', shards=1)
    write_shard(d / 'train-00000-of-00001.parquet', x[:6], y[:6])
    monkeypatch.setattr(
        image_sources, 'read_shard', lambda *_: pytest.fail('decoded before it counted')
    )
    reads(d, '6 train images', 'expected the 12')


def test_class_folders_of_cifar_are_counted(tmp_path):
    d = write_folders(tmp_path / 'd')
    next((d / 'test' / 'baby').iterdir()).unlink()
    reads(d, '5 test images', 'expected the 6')
    assert len(image_set('folder', d).test) == 5  # a folder of one's own may hold any number


@pytest.mark.parametrize('split', ['train', 'test'])
def test_class_in_one_split_only(tmp_path, split):
    d = write_folders(tmp_path / 'd')
    (d / split / 'zebra').mkdir()
    reads(d, 'zebra', 'only one split', source='folder')


def test_class_without_images(tmp_path):
    d = write_folders(tmp_path / 'd')
    for split in 'train', 'test':
        (d / split / 'zebra').mkdir()
    reads(d, 'zebra: no images', '.png', source='folder', error=FileNotFoundError)


# Damaged parts


@pytest.mark.parametrize('keep', [0, 3, 300, -1, -200])
def test_truncated_parquet(tmp_path, keep):
    path = write_parquet(tmp_path / 'd') / 'train-00001-of-00002.parquet'
    path.write_bytes(path.read_bytes()[:keep])
    reads(path.parent, path, 'damaged')


def test_parquet_with_damaged_pages(tmp_path):
    path = write_parquet(tmp_path / 'd') / 'train-00001-of-00002.parquet'
    whole = bytearray(path.read_bytes())
    whole[4:60] = bytes(56)
    path.write_bytes(whole)
    reads(path.parent, path, 'damaged')


@pytest.mark.parametrize(
    'kw, words',
    [
        (dict(image='picture'), ['picture', 'img or image']),
        (dict(label='coarse_label'), ['coarse_label', 'fine_label or label']),
        (dict(cells=[[1, 2]] * 6), ['column img is list', 'struct<bytes']),
        (dict(cells=[dict(bytes=b'no image', path='')] * 6), ['row 0', 'damaged']),
        (dict(cells=[dict(bytes=None, path='a.png')] * 6), ['row 0', 'img.bytes']),
        (
            dict(cells=[dict(bytes=encoded(pixels(1)[0]), path='')] * 3 + [None] * 3),
            ['row 3', 'img.bytes'],
        ),
        (dict(y=[0, 1, 2, 0, 1, None]), ['row 5', 'fine_label']),
        (dict(y=['a'] * 6), ['row 0', 'fine_label']),
        (dict(y=[0, 1, 2, 0, 1, 3]), ['0 to 3', 'expected 0 to 2']),
        (dict(y=[0, 1, 2, 0, 1, -1]), ['-1 to 2', 'expected 0 to 2']),
        (dict(x=pixels(6)[:, :, :30]), ['row 0', '30x32', '32x32']),
    ],
)
def test_shard_that_differs(tmp_path, kw, words):
    d, (x, y) = write_parquet(tmp_path / 'd'), SPLITS['train']
    write_shard(d / 'train-00001-of-00002.parquet', **dict(x=x[6:], y=y[6:]) | kw)
    reads(d, d, *words)


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'JPEG'])
def test_truncated_image_is_named_by_its_row(tmp_path, kind):
    d, (x, y) = write_parquet(tmp_path / 'd'), SPLITS['train']
    cells = [dict(bytes=encoded(o, kind), path=None) for o in x[6:]]
    cells[4]['bytes'] = cells[4]['bytes'][: len(cells[4]['bytes']) // 2]
    write_shard(d / 'train-00001-of-00002.parquet', x[6:], y[6:], cells=cells)
    reads(d, 'train-00001-of-00002.parquet row 4', 'damaged')


def test_too_many_class_names(tmp_path):
    reads(
        write_parquet(tmp_path / 'd', meta={'fine_label_names': 'a\nb\nc\nd'}),
        '4 class names',
        'expected the 3',
    )


@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
def test_pickle_of_another_md5_is_not_opened(tmp_path, monkeypatch, name):
    folder = write_pickles(tmp_path / 'd', monkeypatch)
    (folder / name).write_bytes(b'cos\nabort\n(tR.')  # would end this process
    reads(folder, folder / name, 'md5', 'expected')


class Creates:
    "Whoever unpickles it creates a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
def test_code_in_a_pickle_of_another_md5_never_runs(tmp_path, monkeypatch, name):
    folder, trace = write_pickles(tmp_path / 'd', monkeypatch), tmp_path / 'trace'
    whole = pickle.loads((folder / name).read_bytes())
    (folder / name).write_bytes(pickle.dumps(whole | dict(more=Creates(trace))))
    for d in folder, folder.parent:
        reads(d, folder / name, 'md5', 'expected')
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())['more'].close()
    assert trace.exists(), 'the payload was to work'


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(data=SPLITS['train'][0]), ['(12, 32, 32, 3)', '(n, 3072)']),
        (dict(data=np.zeros((12, 3072))), ['float64', 'uint8']),
        (dict(fine_labels=[0, 1]), ['2 fine_labels']),
        (
            dict(data=np.zeros((6, 3072), np.uint8), fine_labels=[0, 1, 2] * 2),
            ['6 train images', 'expected the 12'],
        ),
        (dict(fine_labels=[0, 1, 5] * 4), ['0 to 5', 'expected 0 to 2']),
    ],
)
def test_pickle_that_differs(tmp_path, monkeypatch, change, words):
    reads(write_pickles(tmp_path / 'd', monkeypatch, **change), *words)


def test_pickle_that_is_none(tmp_path, monkeypatch):
    folder = write_pickles(tmp_path / 'd', monkeypatch)
    (folder / 'train').write_bytes((folder / 'train').read_bytes()[:500])
    known = image_sources.torchvision_set('cifar100')
    known.train_list[0][1] = image_sources._md5(folder / 'train')
    reads(folder, folder / 'train', 'damaged')


def test_damaged_image_in_a_class_folder(tmp_path):
    d = write_folders(tmp_path / 'd')
    path = next((d / 'train' / 'baby').iterdir())
    path.write_bytes(path.read_bytes()[:500])
    reads(d, path, 'damaged', source='folder')


def test_class_folders_of_cifar_have_its_size(tmp_path):
    d = write_folders(tmp_path / 'd', size=30)
    reads(d, '30x30', 'expected 32x32', '.png')
    assert image_set('folder', d).train.x.shape == (TRAIN, 3, 32, 32)


# The config


def test_download_is_only_on_request(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        images,
        'torchvision_set',
        lambda source: lambda root, download: asked.append((source, str(root), download)),
    )
    d = tmp_path / 'd'
    fails(lambda: image_data('cifar100', d), 'expected a folder', error=FileNotFoundError)
    assert not asked
    fails(
        lambda: image_data('cifar100', d, download=True),
        'expected a folder',
        error=FileNotFoundError,
    )  # the stand-in brings nothing
    assert asked == [('cifar100', str(d), True)]
    image_data('cifar100', write_parquet(tmp_path / 'p'), download=True)
    assert len(asked) == 1  # what is there is not downloaded again
    fails(lambda: image_data('digits', d, download=True), 'cifar10 and cifar100')
    fails(lambda: image_data('folder', d, download=True), 'cifar10 and cifar100')


def test_validation_is_never_augmented_nor_drawn_from(tmp_path):
    d = write_parquet(tmp_path / 'd')
    runtime = RuntimeConfig('cpu')
    train, val = image_data('cifar100', d, train_size=3).load(runtime)
    assert len(train) == 3 and sorted(train.y.tolist()) == [0, 1, 2]
    assert np.array_equal(val.x.numpy(), SPLITS['test'][0].transpose(0, 3, 1, 2))
    train, val = image_data('cifar100', d, train_size=6, val_fraction=0.25).load(runtime)
    assert (len(train), len(val)) == (6, 3) and sorted(val.y.tolist()) == [0, 1, 2]
    rows = {x.tobytes() for x in SPLITS['train'][0].transpose(0, 3, 1, 2)}
    seen = [x.tobytes() for ex in (train, val) for x in ex.x.numpy()]
    assert len(set(seen)) == 9 and set(seen) <= rows
    fails(lambda: image_data('cifar100', d, train_size=12, val_fraction=0.25), 'train_size is 12')


def test_config_survives_its_json(tmp_path):
    a = image_data('digits', augment=None, train_size=50)
    plain = json.loads(json.dumps(a.to_dict()))
    kw = {k: v for k, v in plain.items() if k != 'kind'}
    assert ImageData(**kw) == a and ImageData(**kw).hash == a.hash
    assert ImageData(**kw | dict(augment=CropFlip(2, False))).hash != a.hash


@pytest.mark.gpu
def test_crops_are_the_same_on_the_device():
    x = torch.from_numpy(pixels(64).transpose(0, 3, 1, 2).copy())
    assert torch.equal(CropFlip()(x.cuda(), 3, 4).cpu(), CropFlip()(x, 3, 4))
