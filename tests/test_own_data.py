"Data of one's own: arrays and Datasets that go in, and those that are refused."

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from xcl.config import Config
from xcl.data import CropFlip, check_data, check_examples
from xcl.own_data import OwnData, own

SIDE = 12  # of the images, pixels


def images(n=20, c=3, seed=0, side=SIDE):
    return np.random.default_rng(seed).integers(256, size=(n, side, side, c), dtype=np.uint8)


def labels(n=20, classes=3):
    return np.arange(n) % classes


class Pictures(Dataset):
    "Items as a function says."

    def __init__(self, item, n=20):
        self.item, self.n = item, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item(i)


X, Y = images(), labels()
PAIR = X, Y
VAL = images(9, seed=1), labels(9)


@pytest.mark.parametrize(
    'x',
    [
        X,
        X.transpose(0, 3, 1, 2),
        torch.from_numpy(X),
        torch.from_numpy(X).permute(0, 3, 1, 2),
        (X / 255).astype(np.float32),
        X / 255,
        torch.from_numpy(X).permute(0, 3, 1, 2).float() / 255,
    ],
)
@pytest.mark.parametrize('y', [Y, Y.tolist(), torch.from_numpy(Y), Y.astype(np.uint8)])
def test_every_form_of_an_array_is_the_same_run(x, y):
    data = own((x, y), VAL, classes=3)
    assert data == own(PAIR, VAL, classes=3)
    train, val = data.load(None)
    assert np.array_equal(train.x.permute(0, 2, 3, 1).numpy(), X) and train.y.tolist() == Y.tolist()
    assert (len(val), val.y.dtype) == (9, torch.int64)
    check_data(data)
    check_examples(train)


def pil(i):
    return Image.fromarray(X[i]), int(Y[i])


def as_tensor(i):
    return torch.from_numpy(X[i]).permute(2, 0, 1) / 255, torch.tensor(Y[i])


@pytest.mark.parametrize('item', [pil, as_tensor, lambda i: (X[i], np.int64(Y[i]))])
def test_every_form_of_a_dataset_is_the_same_run(item):
    expected = own(PAIR, VAL, classes=3)
    assert own(Pictures(item), VAL, classes=3) == expected
    assert own(Subset(Pictures(item), range(20)), VAL, classes=3) == expected
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    assert own(tensors, VAL, classes=3) == expected


def test_grey_images():
    x = images(c=1)
    data = own((x[..., 0], Y), (x[:9], Y[:9]), classes=3)
    assert data.shape == (1, 12, 12) and len(data.mean) == 1
    assert (
        own(Pictures(lambda i: (Image.fromarray(x[i, ..., 0]), int(Y[i]))), (x[:9], Y[:9]), 3)
        == data
    )


def test_sixteen_bit_pil_images_go_through_the_opener():
    deep = X[..., 0].astype(np.uint16) * 257
    item = lambda i: (Image.fromarray(deep[i]), int(Y[i]))
    train, _ = own(Pictures(item), VAL, classes=3).load(None)
    assert np.array_equal(train.x[:, 1].numpy(), X[..., 0])


def test_one_pixel_one_label_the_order_and_the_augmentation_name_the_run():
    other = X.copy()
    other[7, 3, 3, 1] ^= 1
    relabelled = Y.copy()
    relabelled[3] = 2
    swapped = np.r_[1, 0, 2:20]
    sets = [PAIR, (other, Y), (X, relabelled), (X[swapped], Y[swapped])]
    hashes = {own(train, VAL, classes=3).hash for train in sets}
    hashes |= {own(PAIR, (VAL[0], VAL[1][::-1].copy()), classes=3).hash}
    hashes |= {own(PAIR, VAL, classes=4).hash, own(PAIR, VAL, classes=3, augment=CropFlip()).hash}
    assert len(hashes) == 7


FLIP = v2.Compose([v2.RandomHorizontalFlip()])
NORMALISE = v2.Normalize([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    'train, classes, words',
    [
        (
            Pictures(lambda i: (FLIP(Image.fromarray(X[i])), 0)),
            3,
            ['augments', 'augment=CropFlip()'],
        ),
        (Pictures(lambda i: (NORMALISE(as_tensor(i)[0]), 0)), 3, ['1/255', 'before Normalize']),
        ((X.astype(float) * 1.5, Y), 3, ['1/255', 'uint8']),
        ((X / 255 + 0.001, Y), 3, ['1/255']),
        ((X.astype(np.int64), Y), 3, ['int64', 'uint8']),
        ((images(c=2), Y), 3, ['(20, 12, 12, 2)', 'no axis', '1 or 3 channels']),
        ((X[:, :3], Y), 3, ['two axes']),
        ((X[0], Y), 3, ['(12, 1, 12, 3)', 'two axes']),
        ((X, Y), None, ['classes=3']),
        ((X, Y), 2, ['from 0 to 2', '0 to 1']),
        ((X, Y - 1), 3, ['from -1 to 1']),
        ((X, Y.astype(float)), None, ['float64 (20,)', 'floats (n, d)']),
        ((X, Y[:, None] / 2), 3, ['integer labels with']),
        ((X, np.full((20, 2), np.nan)), None, ['labels[0]', 'finite']),
        ((X, Y[:5]), 3, ['20 images and 5 labels']),
        ((images(side=9), Y), 3, ['(3, 9, 9)', '(3, 12, 12)', 'expected equal']),
        (Pictures(lambda i: (X[i, : 12 - i % 2], 0)), 3, ['resize them to one']),
        (Pictures(pil, n=0), 3, ['empty']),
        (PAIR, 1, ['classes is 1', 'from 2']),
        (PAIR, True, ['classes is True']),
    ],
)
def test_what_is_refused(train, classes, words):
    with pytest.raises(ValueError) as e:
        own(train, VAL, classes=classes)
    missing = [w for w in words if w not in str(e.value)]
    assert not missing, f'{missing} not in: {e.value}'


@pytest.mark.parametrize(
    'train', [X, [X], (X, Y, Y), 'photos/', None, Pictures(lambda i: X[i]), (i for i in ())]
)
def test_what_is_no_set(train):
    with pytest.raises(TypeError):
        own(train, VAL, classes=3)


def test_regression_is_scored_per_dimension():
    y = np.random.default_rng(0).normal(size=(20, 2))
    data = own((X, y), (X[:5], y[:5]))
    calls = dict(mean=lambda o: o[:, :2], from_labels=lambda y: y)
    likelihood = SimpleNamespace(**calls, nll=lambda o, y: torch.tensor(7.0))
    _, val = data.load(None)
    assert (data.classes, data.dimensions, val.y.dtype) == (0, 2, torch.float32)
    error = torch.tensor([[3.0, 4.0]])
    out = torch.cat([val.y + error, torch.zeros(5, 1)], 1)
    score = data.score(likelihood, out, val)
    relative = (np.array([9, 16]) / val.y.numpy().var(0)).mean() ** 0.5
    expected = dict(mse=12.5, rmse=12.5**0.5, rmse_0=3, rmse_1=4, val_loss=7, nrmse=100 * relative)
    assert score == pytest.approx(expected, rel=1e-5)
    one = own((X, y[:, :1]), (X[:5], y[:5, :1]))
    found = one.score(likelihood, out[:, :1], one.load(None)[1])
    assert set(found) == {'mse', 'rmse', 'nrmse', 'val_loss'}


def test_another_process_says_what_to_do(tmp_path):
    data = own(PAIR, VAL, classes=3)
    code = f'from xcl.own_data import OwnData; OwnData({data.digest!r}, (3, 12, 12), 3).load(None)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode and 'LookupError: own data' in done.stderr and 'own(...)' in done.stderr


def test_fields_are_checked():
    with pytest.raises(ValueError, match='classes or dimensions'):
        OwnData('x', (3, 1, 1))
    with pytest.raises(TypeError, match='augment is'):
        OwnData('x', (3, 1, 1), 3, augment='flip')


@pytest.mark.parametrize(
    'members, words',
    [
        (dict(load=None), ['load is missing', 'load(runtime)']),
        (dict(load=lambda self: 0), ['cannot be called as load(runtime)']),
        (dict(score=lambda self, out, val: 0), ['score(likelihood, out, val)']),
        (dict(score=3), ['score is a int', 'expected a method']),
        (dict(augment=None), []),
    ],
)
def test_contract_names_the_member(members, words):
    whole = dict(
        augment=None, load=lambda self, runtime: 0, score=lambda self, likelihood, out, val: 0
    )
    mine = type('Mine', (Config,), whole | members)()
    if not words:
        return check_data(mine)
    with pytest.raises(TypeError) as e:
        check_data(mine)
    assert all(w in str(e.value) for w in ['Mine.', *words]), e.value
