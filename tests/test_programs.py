"""The programs that a stranger writes: own student, own teacher, own data, own method, own generator.

Each program is short, and none touches a file of the package. After each comes what happens where a contract
is not met."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.models import mobilenet_v3_small

from xcl.config import from_dict
from xcl.deploy import load, pack
from xcl.evaluate import evaluate
from xcl.export import export
from xcl.generated import Online
from xcl.generators import Sampled, own_generator
from xcl.likelihoods import Categorical, Gaussian, target_stats
from xcl.nets import net
from xcl.objective import Both, Objective, Teacher
from xcl.own_data import own
from xcl.predict import predict_images
from xcl.pretrained import given
from xcl.recipe import Recipe
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig
from xcl.train import METHODS, Method, Train
from xcl.transfer import Empirical, Mix, MixUp, RandomChoice, Transfer
from xcl.unlabelled import Unlabelled, unlabelled_images

RECIPE = Recipe('sgd', 0.1, batch=16, epochs=2)
HERE = RuntimeConfig('cpu', progress=False)
SHAPE = 3, 12, 12  # of an image


def shapes(n, seed):
    "Images of bright squares, discs and stripes on noise: uint8 (n, 3, 12, 12), labels (n,)."
    g = np.random.default_rng(seed)
    x, y = g.integers(0, 80, (n, 3, 12, 12)), np.arange(n) % 3
    row, column = np.mgrid[:12, :12]
    disc = (row - 6) ** 2 + (column - 6) ** 2 < 16
    for image, label in zip(x, y):
        image[:, [(row // 2) % 2 == 0, disc, row * 0 + column > 6][label]] += 150
    return x.astype(np.uint8), y


(X, Y), (X_VAL, Y_VAL) = shapes(48, 0), shapes(24, 1)


class Tiny(nn.Module):
    "A student of one's own, with dropout."

    def __init__(self, n_out, hidden=16):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(432, hidden), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(hidden, n_out)

    def forward(self, x):
        return self.head(self.body(x))


def linear(seed, classes=3):
    "A trained network from elsewhere."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(432, classes)).eval()


@pytest.fixture
def data():
    return own((X, Y), (X_VAL, Y_VAL), classes=3)


def trained(method, data, **kw):
    "The finished run of a tiny student."
    teachers = (given(linear(0), classes=3, shape=SHAPE),) if method.objective.needs_teacher else ()
    kw = dict(seed=1, teachers=teachers) | kw
    return ensure(Train(net(Tiny), Categorical(3), data, method, RECIPE, **kw), HERE)


# ---- student, teacher and data of one's own ----


def test_a_live_teacher_and_a_class_of_ones_own():
    data = own((X, Y), (X_VAL, Y_VAL), classes=3)
    teacher = given(linear(0), classes=3, shape=SHAPE)
    for row in 'KD', 'XCL-Mix':
        method = METHODS[row]
        run = ensure(
            Train(net(Tiny), Categorical(3), data, method, RECIPE, seed=1, teachers=(teacher,)),
            HERE,
        )
        assert run.done and 0 <= run.result['top1'] <= 100 and run.result['steps'] == 6


class Pictures(Dataset):
    "PIL images and labels."

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return Image.fromarray(X[i].transpose(1, 2, 0)), int(Y[i])


def test_a_dataset_of_ones_own(data):
    pairs = Pictures()
    tensors = TensorDataset(torch.from_numpy(X_VAL), torch.from_numpy(Y_VAL))
    assert own(pairs, tensors, classes=3).hash == data.hash, 'the same pixels are the same data'
    assert trained(METHODS['ERM'], own(pairs, tensors, classes=3)).done


def test_an_ensemble_of_two_weight_files(data, tmp_path):
    for seed in 1, 2:
        torch.manual_seed(seed)
        checkpoint = dict(state_dict=Tiny(3).state_dict(), epoch=7, best=np.float64(0.5))
        torch.save(checkpoint, tmp_path / f'{seed}.pth.tar')
    paths = [tmp_path / f'{seed}.pth.tar' for seed in (1, 2)]
    teacher = given(*paths, net=net(Tiny), classes=3, shape=SHAPE)
    run = trained(METHODS['XCL-Mix'], data, teachers=teacher)
    assert len(run.cfg.teachers) == 2 and run.done
    with pytest.raises(ValueError, match='other|does not fit|missing'):
        given(*paths, net=net(Tiny, hidden=8), classes=3, shape=SHAPE)


def test_unlabelled_images_of_ones_own(tmp_path):
    for i, x in enumerate(shapes(30, 2)[0]):
        Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path / f'{i}.png')
    data = own((X, Y), (X_VAL, Y_VAL), classes=3)
    teacher = given(linear(0), classes=3, shape=SHAPE)
    images = unlabelled_images(tmp_path, size=data.size)  # a folder; or an array of images
    for mix in Empirical(), RandomChoice():
        method = Method('KD + unlabelled', Unlabelled(images, mix), Teacher())
        cfg = Train(net(Tiny), Categorical(3), data, method, RECIPE, seed=1, teachers=teacher)
        run = ensure(cfg, HERE)
        assert run.done and run.result['steps'] == 6


def test_regression_with_uncertainty(tmp_path):
    y, y_val = (np.stack([150 + 9 * v, v**2], 1).astype(np.float32) for v in (Y, Y_VAL))
    data = own((X, y), (X_VAL, y_val))  # numbers in any unit
    kind = Gaussian(**target_stats(y), per_dimension=True)  # a mean and a σ for each
    small, recipe = net('resnet18', width=4), Recipe('adam', 1e-3, batch=16, epochs=2)
    teachers = [Train(small, kind, data, METHODS['MixUp'], recipe, s) for s in (101, 102)]
    method = Method('XCL-Mix', MixUp(), Teacher())
    run = ensure(Train(small, kind, data, method, recipe, 1, teachers), HERE)
    pack(run, tmp_path / 'student.xcl', classes=('length (mm)', 'weight (g)'))
    answers = predict_images(*load(tmp_path / 'student.xcl'), X_VAL)
    assert list(answers.columns)[1:] == [
        *('length (mm)', 'weight (g)'),
        *('sigma of length (mm)', 'sigma of weight (g)'),
    ]
    assert run.done and 0 <= run.result['coverage'] <= 100
    out = run.tensors('predictions')['out']
    assert np.allclose(answers.iloc[:, 1:3], kind.mean(out), rtol=1e-4)
    assert np.allclose(answers.iloc[:, 3:], kind.std(out), rtol=1e-4)
    score = evaluate(load(tmp_path / 'student.xcl')[0], data, HERE)
    assert score['nrmse'] == pytest.approx(run.result['nrmse'], rel=1e-4)


def test_a_teacher_of_numbers_says_in_which_unit_it_answers():
    y, y_val = (np.stack([150 + 9 * v], 1).astype(np.float32) for v in (Y, Y_VAL))
    data, kind = own((X, y), (X_VAL, y_val)), Gaussian(**target_stats(y))
    method = Method('KD', Empirical(), Teacher())
    silent = given(linear(0, 2), shape=SHAPE)
    with pytest.raises(ValueError, match=r'given\(..., likelihood=...\)'):
        Train(net(Tiny), kind, data, method, RECIPE, 1, silent)
    stated = given(linear(0, 2), shape=SHAPE, likelihood=kind)
    assert ensure(Train(net(Tiny), kind, data, method, RECIPE, 1, stated), HERE).done


class TorchVision(nn.Module):
    "A network of torchvision, as people wrap it."

    def __init__(self, n_out):
        super().__init__()
        self.net = mobilenet_v3_small(num_classes=n_out)  # with dropout

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize('student', [net(TorchVision), net('timm/resnet10t')], ids=str)
def test_torchvision_and_timm_students_of_any_size(student, tmp_path):
    "Trained on images of 40 pixels by a checkpoint as people save it, packed, exported."
    x, x_val = (np.repeat(np.repeat(v, 4, 2), 4, 3)[:, :, :40, :40] for v in (X, X_VAL))
    data = own((x, Y), (x_val, Y_VAL), classes=3)
    torch.manual_seed(0)
    checkpoint = dict(model={f'module.{k}': v for k, v in TorchVision(3).state_dict().items()})
    torch.save(checkpoint | dict(epoch=3), tmp_path / 'teacher.pth')
    teacher = given(tmp_path / 'teacher.pth', net=TorchVision, classes=3, shape=(3, 40, 40))
    recipe = Recipe('sgd', 0.01, batch=16, epochs=1)
    run = ensure(Train(student, Categorical(3), data, METHODS['KD'], recipe, 1, teacher), HERE)
    pack(run, tmp_path / 'student.xcl')
    network, meaning = load(tmp_path / 'student.xcl')
    export(network, tmp_path / 'student.pt2')  # compares outputs
    answers = predict_images(network, meaning, x_val)
    out = run.tensors('predictions')['out'].softmax(-1).max(-1)[0]
    assert np.allclose(answers.probability, out, atol=1e-4)


# ---- methods of one's own ----


def test_hinton(data):
    hinton = Method('Hinton KD', Empirical(), Both(labels=0.1, teacher=0.9))
    assert trained(hinton, data).done


@dataclass(frozen=True)
class SquaredLogits(Objective):
    "Squared distance of logits to the teacher's log-probabilities."

    needs_teacher = True

    def loss(self, likelihood, out, labels, soft):
        return (out.log_softmax(-1) - soft.log()).square().mean()


@dataclass(frozen=True)
class Darker(Transfer):
    "Training images blended with a darker partner."

    def draw(self, seed, step, shape):
        lam = torch.full((shape[0],), 0.8)
        return Mix(torch.arange(shape[0]).roll(1), lam)


def test_an_objective_and_a_transfer_set_of_ones_own(data):
    runs = [
        trained(Method('squared', MixUp(), SquaredLogits()), data),
        trained(Method('darker', Darker(), Teacher()), data),
    ]
    assert len({r.cfg.hash for r in runs}) == 2 and all(r.done for r in runs)
    assert all(from_dict(r.cfg.to_dict()) == r.cfg for r in runs)


def test_a_generator_of_ones_own(data):
    class Flat(nn.Module):
        def forward(self, z, v):
            return (v @ torch.ones(3, 432) * 0.1 + z.repeat(1, 144)).tanh().view(-1, 3, 12, 12)

    generator = own_generator(Flat().eval(), torch.eye(3), z_dim=3, size=12)
    run = trained(Method('XCL-GAN', Online(Sampled(generator), 0.5), Teacher()), data)
    assert run.done


# ---- named by content ----


def test_an_edited_class_other_weights_other_pixels_are_other_runs(data):
    first = trained(METHODS['KD'], data).cfg

    class Tiny(nn.Module):
        def __init__(self, n_out):
            super().__init__()
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(432, n_out))

        def forward(self, x):
            return self.head(x)

    darker = own((X // 2, Y), (X_VAL, Y_VAL), classes=3)
    others = [
        Train(net(Tiny), *_parts(first), first.teachers),
        Train(first.net, *_parts(first), given(linear(1), classes=3, shape=SHAPE)),
        Train(first.net, first.likelihood, darker, first.method, RECIPE, 1, first.teachers),
    ]
    hashes = {first.hash, *(c.hash for c in others)}
    assert len(hashes) == 4
    for cfg in others:
        assert ensure(cfg, HERE).folder != ensure(first, HERE).folder
    weights = [ensure(c, HERE).tensors() for c in (first, others[1])]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


def _parts(cfg):
    return cfg.likelihood, cfg.data, cfg.method, cfg.recipe, cfg.seed


# ---- contracts that are not met ----


@dataclass(frozen=True)
class NoLoss(Objective):
    needs_labels = True


@dataclass(frozen=True)
class NoDraw(Transfer):
    pass


REFUSED = {
    'an objective without loss': (
        lambda d: trained(Method('x', Empirical(), NoLoss()), d),
        TypeError,
        r'NoLoss\.loss is missing; expected loss\(likelihood, out, labels, soft\)',
    ),
    'a transfer set without draw': (
        lambda d: trained(Method('x', NoDraw(), Teacher()), d),
        NotImplementedError,
        r'NoDraw\.draw',
    ),
    'a teacher with other outputs': (
        lambda d: trained(METHODS['KD'], d, teachers=given(linear(0, 5), classes=5, shape=SHAPE)),
        ValueError,
        'has 5 outputs; the student has 3',
    ),
    'a module as a student': (
        lambda d: net(linear(0)),
        TypeError,
        'expected a class derived from torch.nn.Module',
    ),
    'a name as a student': (
        lambda d: Train('resnet18', Categorical(3), d, METHODS['ERM'], RECIPE, 1),
        TypeError,
        "net is 'resnet18'; expected Net",
    ),
    'images that are no bytes': (
        lambda d: own((X / 7.3, Y), (X_VAL, Y_VAL), classes=3),
        (TypeError, ValueError),
        'uint8',
    ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_contracts(what, data):
    f, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        f(data)
