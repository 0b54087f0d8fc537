"""Folder names of runs: the hashes of configs stay what they were, for every kind of config.

A default, a field or a recipe that changes renames the runs of all users. Where that is meant, see
CONTRIBUTING.md, 'Defaults are frozen', and put the new hash here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from xcl.config import Config, config_kinds
from xcl.data import CropFlip
from xcl.diff_augment import DiffAugment
from xcl.folders import FolderData, TestFolder, Thumbnails
from xcl.gan_quality import Evaluator
from xcl.gans import GAN_RECIPES, BigGAN
from xcl.gaze_data import EyeData
from xcl.generated import Offline, Online
from xcl.generated_sets import GeneratedSet, SetTargets
from xcl.generators import OwnGenerator, Sampled
from xcl.images import ImageData
from xcl.likelihoods import Categorical, Gaussian, Likelihood, Point
from xcl.nets import Net, net
from xcl.objective import Both, Labels, Objective, Teacher
from xcl.own_data import OwnData
from xcl.paper.imagenet import Tested
from xcl.paper.rows import RECIPES
from xcl.photo_transforms import PhotoAugment
from xcl.pretrained import Given
from xcl.refine import Refined, SimGAN
from xcl.runs import RunConfig
from xcl.simulated_eyes import Simulated, SimulatedEyes
from xcl.target_eyes import RealEyes, TrainingEyes, WebcamEyes
from xcl.targets import TargetCacheKey
from xcl.train import METHODS, Method, Train
from xcl.transfer import CutMix, Empirical, Mixing, MixUp, RandomChoice, Transfer
from xcl.unlabelled import Unlabelled, UnlabelledImages

BASES = Config, RunConfig, Likelihood, Objective, Transfer, Mixing
PINNED = {
    'CropFlip': 'dc722eb6e3be',
    'DiffAugment': 'fb65489d11d9',
    'PhotoAugment': 'ff5a89621b8a',
    'Empirical': '3a63d1ec614e',
    'MixUp': '9d65634b0f60',
    'CutMix': '2e40e6aaca51',
    'RandomChoice': '503e8faba4c7',
    'UnlabelledImages': 'e71ed386b068',
    'Unlabelled': '732598f38b83',
    'Labels': 'ad9252b5b188',
    'Teacher': 'b2e690ee7325',
    'Both': '5e31db35daac',
    'Point': '1e73f0f3ba00',
    'Gaussian': '28c65b998a98',
    'Categorical': 'c3945ffa6f76',
    'ImageData': '3989e7bcc1d3',
    'Thumbnails': '5e71fc7b3ca6',
    'FolderData': '5669f1465a21',
    'TestFolder': '706b7bd807f4',
    'OwnData': '467a9cc99642',
    'EyeData': '3e20a8748530',
    'RealEyes': '170ef780306b',
    'WebcamEyes': '88f612d0b78d',
    'Simulated': 'a3175a05d4ef',
    'Net': '338377e4a648',
    'OwnGenerator': 'b69b420f0464',
    'Given': '4ce6593c766c',
    'GanRecipe': '6e4deb0966b2',
    'BigGAN': '7575e972e7aa',
    'Evaluator': 'f108980bf4b2',
    'GeneratedSet': '91c7267157bd',
    'Sampled': 'f5e4aa2679fb',
    'SetTargets': '9a7334493d08',
    'TargetCacheKey': '3b983a87daf6',
    'Online': '612d4bdfb730',
    'Offline': 'fe4e2f017cbd',
    'SimulatedEyes': '7b77408499c5',
    'TrainingEyes': '4d4014164862',
    'SimGAN': '8127bdf130c1',
    'Refined': '56df27a504d6',
    'Tested': 'db0ed040ceab',
    'Recipe': 'd041e88ebf95',
    'Method ERM': '42651f7cddc7',
    'Method LS': 'd787b4800166',
    'Method MixUp': '2a8e24907ab0',
    'Method CutMix': 'db58d3d177c7',
    'Method KD': '1d4966ce7ce5',
    'Method XCL-Mix': 'eee83e934c16',
    'images, ERM': '6eeb007e93a9',
    'images, LS': 'e32e4c438ad0',
    'images, MixUp': '78bf544b7a6c',
    'images, CutMix': '271cddaea654',
    'images, KD': '860aaa6aa08d',
    'images, XCL-Mix': 'ef9ad2b4ed2a',
    'gaze, ERM': '74da82559e8b',
    'gaze, MixUp': '6634ded23169',
    'gaze, KD': '59fb89773a49',
    'seed=2': '7f242e5ba56d',
    'precision=bf16': '1be617e611e6',
    'targets=half': 'ab4b7dba25cb',
    'teacher_precision=bf16': 'ca88202d3d5d',
    'val_every=2': '595b9c604f2f',
    'T=5': '06f2eb2b7d4a',
    'both': 'f742d6445ba8',
}


def parts() -> list:
    "One config of every kind that has no run in it, at its defaults."
    return [
        *(CropFlip(), DiffAugment(), PhotoAugment()),
        *(Empirical(), MixUp(), CutMix(), RandomChoice()),
        *(UnlabelledImages('x', 9, (3, 32, 32)), Unlabelled(UnlabelledImages('x', 9, (3, 32, 32)))),
        *(Labels(), Teacher(), Both()),
        *(Point(), Gaussian(), Categorical(100)),
        *(ImageData('cifar100', 100, digest='x'), Thumbnails('folder', 3, digest='x')),
        *(FolderData(1000, 'x'), TestFolder('V2-A', 1000, 'x'), OwnData('x', (3, 32, 32), 10)),
        *(EyeData('mpiigaze', 0, digest='x'), RealEyes('x'), WebcamEyes(1), Simulated(1)),
        *(net('resnet18', width=64), Net('function:stranger.network', digest='x')),
        *(OwnGenerator('x', 10, 128, 32), Given('timm', 'resnet152d', 'x', 1000)),
    ]


def trained(data, name, likelihood, method, teachers=()):
    "A student or teacher by the recipe of its network."
    kind = net(name)
    return Train(kind, likelihood, data, METHODS[method], RECIPES[name], 1, teachers)


def runs() -> list:
    "One config of every kind that has runs in it."
    images, eyes = ImageData('cifar100', 100, digest='x'), EyeData('mpiigaze', 0, digest='x')
    member = trained(images, 'resnet18', Categorical(100), 'CutMix')
    gan = BigGAN(images, GAN_RECIPES['biggan'], 1, Evaluator(member))
    stored = GeneratedSet(Sampled(gan), 50_000, 1)
    source = SimulatedEyes(Simulated(1), 1)
    refiner = SimGAN(source, TrainingEyes(eyes), 1, 0.1, 10_000)
    key = TargetCacheKey((member,), Categorical(100), images, MixUp(), 128, 1, 'exact')
    targets = SetTargets(stored, (member,), Categorical(100))
    return [gan.recipe, gan, gan.evaluator, gan.data, stored, stored.sampler, targets, key] + [
        *(Online(Sampled(gan)), Offline(stored), source, refiner.target, refiner, Refined(refiner)),
        *(Tested(member, FolderData(100, 'x')), RECIPES['lenet']),
        *(METHODS[name] for name in METHODS),
    ]


def students() -> dict:
    "Every method, for images and for gaze; and each field of a `Train` that is not at its default."
    images, eyes = ImageData('cifar100', 100, digest='x'), EyeData('mpiigaze', 0, digest='x')
    found = {}
    sizes = dict(images=('resnet18', Categorical(100), images), gaze=('lenet', Gaussian(), eyes))
    for kind, (name, likelihood, data) in sizes.items():
        member = trained(data, name, likelihood, 'ERM')
        for method, m in METHODS.items():
            if kind == 'images' or method not in ('LS', 'CutMix', 'XCL-Mix'):
                teachers = (member, replace(member, seed=2)) if m.objective.needs_teacher else ()
                found[f'{kind}, {method}'] = trained(data, name, likelihood, method, teachers)
    base = found['images, KD']
    others = dict(seed=2, precision='bf16', targets='half', teacher_precision='bf16', val_every=2)
    for field, value in others.items():
        found[f'{field}={value}'] = replace(base, **{field: value})
    soft = replace(base.likelihood, temperature=5.0, scale_t2=True)
    found['T=5'] = replace(base, likelihood=soft)
    both = Method('both', RandomChoice(), Both(0.3, 0.7))
    found['both'] = replace(base, method=both)
    return found


def names() -> dict:
    "Label -> hash."
    kinds = {
        type(o).__name__ + (f' {o.name}' if isinstance(o, Method) else ''): o.hash
        for o in parts() + runs()
    }
    return kinds | {k: o.hash for k, o in students().items()}


def test_every_kind_of_config_is_pinned():
    own = {
        k for k, v in config_kinds().items() if v.__module__.startswith('xcl.') and v not in BASES
    }
    assert own == {type(o).__name__ for o in [*parts(), *runs(), *students().values()]}


def test_hashes_are_what_they_were():
    assert names() == PINNED


def test_hashes_are_what_they_were_in_another_process():
    "Where strings are hashed with another seed, so that sets have another order."
    done = subprocess.run(
        [sys.executable, '-c', 'import json, test_names; print(json.dumps(test_names.names()))'],
        cwd=Path(__file__).parent,
        env={**os.environ, 'PYTHONHASHSEED': '271828'},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == PINNED
