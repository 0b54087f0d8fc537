"""What must not go wrong, many times over: kills, bad inputs, damaged files.

    python benchmarks/soak.py --out outputs/benchmarks/soak.json
    python benchmarks/soak.py --kills 4 --kinds BigGAN 'gaze ERM' --inputs 200 --files 200

*kills*    Every kind of training is killed (SIGKILL) at random moments and started again until it ends;
           what it leaves is compared with a run that was never killed, tensor by tensor, bit by bit.
*inputs*   Wrong values of every parameter of every experiment, and of every field of the configs: each has
           to be refused with the name of the parameter or field (a config may accept it as it is).
*files*    Images, files of weights and packed networks with bytes flipped, cut off, zeroed or put in front:
           each is read as what it is, or refused with the name of the file.

A fault is counted and listed; the exit code says whether there was one. Random numbers come from --seed."""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import torch
import torch._dynamo  # 900 modules that a first optimiser imports: here once, not in every child
from gpu_acceptance import TINY, Configs, small_kinds
from PIL import Image

from xcl.config import rng
from xcl.data import CropFlip
from xcl.deploy import load, pack
from xcl.diff_augment import DiffAugment
from xcl.files import read_tensors, write_json
from xcl.gans import BigGAN, GanRecipe
from xcl.image_files import open_image
from xcl.images import image_data
from xcl.likelihoods import Categorical, Gaussian
from xcl.nets import net
from xcl.paper.cifar import BinaryNetParams, PyramidNetParams, ResNet18Params
from xcl.paper.few_images_page import FewImagesParams
from xcl.paper.gan import GanParams
from xcl.paper.gaze import GazeParams
from xcl.paper.imagenet import ImagenetParams
from xcl.paper.params import ParameterError
from xcl.paper.results import ResultsParams
from xcl.paper.shipping import ShippingParams
from xcl.paper.simgan import SimganParams
from xcl.paper.smoothing import SmoothingParams
from xcl.paper.student_size import StudentSizeParams
from xcl.paper.teacher_kinds import TeachersParams
from xcl.paper.temperature import TemperatureParams
from xcl.paper.yours import YoursParams
from xcl.paper.yours_regression import RegressionParams
from xcl.recipe import Recipe
from xcl.refine import SimGAN
from xcl.runs import Run, ensure
from xcl.runtime import RuntimeConfig, provenance
from xcl.train import METHODS, Train
from xcl.transfer import CutMix, MixUp, RandomChoice
from xcl.unlabelled import Unlabelled, unlabelled_images
from xcl.weight_files import read_weights

HERE = dict(device='cpu', progress=False, workers=0)


# Kills


def short(cfg):
    "A config with its length cut to a few dozen steps."
    if isinstance(cfg, BigGAN):
        return replace(cfg, recipe=replace(cfg.recipe, steps=24), every=5)
    if isinstance(cfg, SimGAN):
        return replace(cfg, steps=24, pretrain_r=6, pretrain_d=6, every=8)
    recipe = replace(cfg.recipe, epochs=8, milestones=(4.0,), warmup=0.0)
    return replace(cfg, recipe=recipe, val_every=3)


def make(cfg, home, cache):
    "Train a run to its end, silently, with a checkpoint after nearly every step."
    sys.stdout = open(os.devnull, 'w')
    os.environ['XCL_HOME'] = str(home)
    ensure(cfg, RuntimeConfig(**HERE, checkpoint_s=0.01, target_cache=cache))


def started(cfg, home, cache):
    "A child process that trains."
    child = multiprocessing.get_context('fork').Process(target=make, args=(cfg, home, cache))
    child.start()
    return child


def left(cfg, home):
    "What a finished run has left: name -> tensor, or text."
    folder = Path(home) / Run(cfg).folder.name
    found = {p.name: p.read_text() for p in (folder / 'result.json', folder / 'curve.json')}
    for path in sorted(folder.glob('*.safetensors')):
        found |= {f'{path.name}/{k}': v for k, v in read_tensors(path).items()}
    return found


def same(a, b):
    "Whether two runs have left the same bits."
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())


def kill_kind(cfg, base, homes, kills, g, cache):
    "Kill one kind of training; (kills, ends compared, faults)."
    reference, home = homes
    for place in homes:
        shutil.copytree(base, place)
    began = time.monotonic()
    started(cfg, reference, cache).join()
    seconds, expected = time.monotonic() - began, left(cfg, reference)
    done, ends, faults = 0, 0, []
    while done < kills or not ends:
        child = started(cfg, home, cache)
        child.join(g.uniform(0.05, 0.7) * seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            done += 1
            continue
        ends += 1
        if child.exitcode or not same(left(cfg, home), expected):
            faults.append(f'{cfg.slug}: exit code {child.exitcode}, or other bits')
        shutil.rmtree(home)
        shutil.copytree(base, home)
    return done, ends, faults


def soak_kills(a, g, tmp):
    "Kill every kind of training."
    os.environ['XCL_HOME'] = str(tmp / 'base')
    kinds = {k: short(f()) for k, f in small_kinds(Configs(TINY, 'cpu')).items()}
    kinds = {k: (cfg, False) for k, cfg in kinds.items()}
    kinds['resnet18 KD half, stored'] = replace(kinds['resnet18 KD half'][0], seed=2), True
    kinds = {k: kinds[k] for k in a.kinds or kinds}
    each, found = -(-a.kills // len(kinds)), Counter()
    by_kind, faults = {}, []
    for k, (cfg, cache) in kinds.items():
        homes = tmp / f'{cfg.hash}-whole', tmp / f'{cfg.hash}-killed'
        kills, ends, wrong = kill_kind(cfg, tmp / 'base', homes, each, g, cache)
        by_kind[k] = dict(kills=kills, ends=ends)
        found.update(kills=kills, ends=ends)
        faults += wrong
        for home in homes:
            shutil.rmtree(home)
        print(f'{k:28} {kills} kills, {ends} ends compared, {len(wrong)} faults', flush=True)
    return dict(found, kinds=by_kind, faults=faults)


# Bad inputs

PARAMS = (
    *(ResNet18Params, PyramidNetParams, BinaryNetParams, SmoothingParams, TemperatureParams),
    *(TeachersParams, StudentSizeParams, GazeParams, GanParams, SimganParams, ImagenetParams),
    *(YoursParams, RegressionParams, ShippingParams, ResultsParams, FewImagesParams),
)
WORDS = 'x', '', '1 x', '1e', '--', 'None', '0x10', '1;2', '１', 'nan', '⁴'


def wrong_values(f, g):
    "Values that a parameter must not accept."
    kind, known = str(f.type), f.metadata
    low, high, choices = known['low'], known['high'], known['choices']
    values = [float('nan'), float('inf'), [], {}, object(), b'1', 1j]
    if kind.startswith(('int', 'float')):
        values += [str(w) for w in g.choice(WORDS, 3)]
        if low is not None:
            span = max(1, abs(high - low))
            values += [low - int(g.integers(1, 100)), high + int(span * g.integers(1, 9)) + 1]
            values += [True] if kind.startswith('int') else []
    elif choices:
        values += ['nonsense', f'{choices[0]} ', f'{choices[0]}?', 3.5]
    elif 'bool' in kind:
        values += ['maybe', 2, 0.5]
    elif 'Rows' in kind:
        values += ['Lion', 'KD T=1.2.3', 'KD, KD', 'ERM; KD', '']
    elif 'tuple' in kind:
        values += ['1 1', 'x', '', '1,,x', 'nan']
    else:
        values = [v for v in values if type(v) not in (float,)]
    return values


def ask_params(cls, f, value):
    "None where a wrong value is refused by name; else what happened."
    try:
        cls.of(preset='smoke', **{f.name: value})
    except ParameterError as e:
        return None if f.name in str(e) else f'{cls.__name__}.{f.name} = {value!r}: {e}'
    except Exception as e:
        return f'{cls.__name__}.{f.name} = {value!r}: {type(e).__name__}: {e}'
    return f'{cls.__name__}.{f.name} = {value!r} was accepted'


def configs():
    "One config of each kind that a user writes."
    recipe = Recipe('sgd', 0.1, 32, 4)
    digits = image_data('digits', train_size=64)
    network, kind = net('resnet18', width=16), Categorical(10)
    train = Train(network, kind, digits, METHODS['ERM'], recipe, 1)
    gan = BigGAN(digits, GanRecipe(8, 8, 8, 4), 1)
    more = Unlabelled(unlabelled_images(np.zeros((4, 3, 16, 16), np.uint8)))
    return [
        *(recipe, digits, network, kind, Gaussian(), train, gan, gan.recipe),
        *(CropFlip(), MixUp(), CutMix(), RandomChoice(), DiffAugment(), METHODS['KD'], more),
    ]


BAD = (
    float('nan'),
    float('inf'),
    -1,
    -1e9,
    0,
    10**400,
    'x',
    '',
    None,
    (),
    (1, 'x'),
    {},
    object(),
    1j,
)


def ask_config(cfg, f, value):
    "None where a value is refused by name, or is kept as it is; else what happened."
    if value == getattr(cfg, f.name) and type(value) is type(getattr(cfg, f.name)):
        return None
    try:
        made = replace(cfg, **{f.name: value})
        assert made.hash
    except (TypeError, ValueError, OSError) as e:
        named = f.name in str(e) or 'allowed' in str(e) or 'expected' in str(e)
        return None if named else f'{type(cfg).__name__}.{f.name} = {value!r}: {e}'
    except Exception as e:
        return f'{type(cfg).__name__}.{f.name} = {value!r}: {type(e).__name__}: {e}'
    finite = not isinstance(value, float) or np.isfinite(value)
    return None if finite else f'{type(cfg).__name__}.{f.name} = {value!r} was accepted'


def cases(g):
    "All questions about inputs: (what is asked, function, its arguments)."
    of_params = [
        ('parameters', ask_params, (cls, f, v))
        for cls in PARAMS
        for f in fields(cls)
        if f.name != 'preset'
        for v in wrong_values(f, g)
    ]
    of_configs = [
        ('configs', ask_config, (c, f, v)) for c in configs() for f in fields(c) for v in BAD
    ]
    return of_params + of_configs


def soak_inputs(a, g, tmp):
    "Give wrong values to parameters and to fields of configs."
    os.environ['XCL_HOME'] = str(tmp / 'inputs')
    known, asked, faults = cases(g), Counter(), []
    some = known if a.inputs >= len(known) else [known[i] for i in g.permutation(len(known))]
    for kind, ask, words in some[: a.inputs]:
        asked[kind] += 1
        faults += [said] if (said := ask(*words)) else []
    print(f'inputs: {dict(asked)}, {len(faults)} faults', flush=True)
    return dict(asked, faults=sorted(set(faults)))


# Damaged files


def damaged(data, g):
    "Bytes with one kind of damage."
    data, n = bytearray(data), len(data)
    kind = ('flip', 'cut', 'zero', 'front', 'swap', 'none')[g.integers(6)]
    at = int(g.integers(n))
    if kind == 'flip':
        for i in g.integers(n, size=int(g.integers(1, 9))):
            data[i] ^= 1 << int(g.integers(8))
    elif kind == 'cut':
        del data[at:]
    elif kind == 'zero':
        data[at : at + int(g.integers(1, 200))] = bytes(min(200, n - at))[: n - at]
    elif kind == 'front':
        data[:0] = (b'<!DOCTYPE html>', b'version https://git-lfs', b'\0' * 64)[g.integers(3)]
    elif kind == 'swap':
        data = data[at:] + data[:at]
    return kind, bytes(data)


def images(g):
    "Whole images of many formats and modes: suffix -> bytes."
    x = g.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    rgb, found = Image.fromarray(x), {}
    modes = dict(png='RGB L P RGBA LA 1 I;16', jpg='RGB L CMYK', bmp='RGB L', gif='P', tiff='RGB L',
                 webp='RGB RGBA')  # fmt: skip
    for suffix, names in modes.items():
        for mode in names.split():
            image = (
                rgb.convert(mode)
                if mode != 'I;16'
                else Image.fromarray(x[..., 0].astype(np.uint16) * 257)
            )
            out = io.BytesIO()
            image.save(out, {'jpg': 'JPEG', 'tiff': 'TIFF'}.get(suffix, suffix.upper()))
            found[f'{mode.replace(";", "")}.{suffix}'] = out.getvalue()
    return found


def weights(tmp):
    "Files of weights: name -> (bytes, how it is read)."
    network, digits = net('resnet18', width=8), image_data('digits', train_size=64)
    recipe = Recipe('sgd', 0.05, 32, 1)
    run = ensure(
        Train(network, Categorical(10), digits, METHODS['ERM'], recipe, 1), RuntimeConfig(**HERE)
    )
    state = run.tensors()
    torch.save(dict(state_dict=state, epoch=3), tmp / 'whole.pth')
    pack(run, tmp / 'whole.xcl')
    return {
        'net.pth': ((tmp / 'whole.pth').read_bytes(), read_weights),
        'net.safetensors': ((run.folder / 'weights.safetensors').read_bytes(), read_weights),
        'net.xcl': ((tmp / 'whole.xcl').read_bytes(), lambda p: load(p)[0].state_dict()),
    }


def read_damaged(path, read, whole, kind):
    "None where a file is read as what it is or refused by name; else what happened."
    try:
        found = read(path)
    except (ValueError, OSError) as e:
        return None if path.name in str(e) else f'{path.name}, {kind}: {e}'
    except Exception as e:
        return f'{path.name}, {kind}: {type(e).__name__}: {e}'
    if kind == 'none' and isinstance(whole, dict) and not same(found, whole):
        return f'{path.name}: a whole file is read as another'
    if path.suffix in ('.xcl', '.safetensors') and not same(found, whole):
        return f'{path.name}, {kind}: read with other numbers, without a word'
    return None


def soak_files(a, g, tmp):
    "Read damaged images and weights."
    os.environ['XCL_HOME'] = str(tmp / 'files')
    tmp = tmp / 'damaged'
    tmp.mkdir()
    wholes = {k: (data, lambda p: open_image(p)[0]) for k, data in images(g).items()}
    wholes |= weights(tmp)
    names, counts, faults = list(wholes), Counter(), []
    known = {}
    for name, (data, read) in wholes.items():
        (tmp / name).write_bytes(data)
        known[name] = read(tmp / name)
    for _ in range(a.files):
        name = names[g.integers(len(names))]
        kind, data = damaged(wholes[name][0], g)
        (tmp / name).write_bytes(data)
        fault = read_damaged(tmp / name, wholes[name][1], known[name], kind)
        counts['weights' if name.startswith('net') else 'images'] += 1
        faults += [fault] if fault else []
    print(f'files: {dict(counts)}, {len(faults)} faults', flush=True)
    return dict(counts, faults=sorted(set(faults)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--kills', type=int, default=200, help='at least (default: 200)')
    p.add_argument('--kinds', nargs='+', help='of training that are killed (default: all)')
    p.add_argument('--inputs', type=int, default=10**6, help='(default: all)')
    p.add_argument('--files', type=int, default=2000, help='images and weights (default: 2000)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='.json to write to')
    a = p.parse_args()
    torch.set_num_threads(1)
    report, began = dict(made_by=provenance(), seed=a.seed), time.time()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        for part in soak_inputs, soak_files, soak_kills:
            name = part.__name__.removeprefix('soak_')
            report[name] = part(a, rng(a.seed, f'soak/{name}'), Path(tmp))
    report['seconds'] = round(time.time() - began)
    faults = [f for v in report.values() if isinstance(v, dict) for f in v.get('faults', ())]
    print('\n'.join(faults[:60]) or 'no fault', f'\n{len(faults)} faults, {report["seconds"]} s')
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, json.loads(json.dumps(report)))
    sys.exit(bool(faults))


if __name__ == '__main__':
    main()
