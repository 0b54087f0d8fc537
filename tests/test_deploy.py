"""Deployment: any network goes into a file that states its meaning, and comes back the same.

torchvision's, timm's and own networks; predictions equal across PyTorch, packed and exported forms;
damaged files from a generator.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import own_nets
import pandas as pd
import pytest
import torch
from children import SERVER, digit_net
from PIL import Image
from torchvision.models import resnet18

from xcl.config import rng, seeded
from xcl.content import content_hash
from xcl.deploy import load, pack, pack_network, packed_size
from xcl.evaluate import evaluate, main, model_card
from xcl.export import export
from xcl.folders import folder_data
from xcl.gaze_data import eye_data
from xcl.images import image_data
from xcl.likelihoods import Categorical, Gaussian
from xcl.meaning import Meaning, build_named, name_of, noise_images
from xcl.packed import packed_bytes, read_packed
from xcl.predict import output_table, predict_images
from xcl.recipe import Recipe
from xcl.runs import ensure
from xcl.runtime import RuntimeConfig
from xcl.target_files import target_files
from xcl.teachers import predict
from xcl.train import METHODS, trained

CPU = RuntimeConfig('cpu', progress=False)
NAMES = 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'
COLOURS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
BASE = Meaning('resnet18', Categorical(10, temperature=4.0), NAMES, (16, 16))
OWN = replace(BASE, name=name_of(own_nets.Plain), source=content_hash(own_nets.Plain), **COLOURS)
TV = 'torchvision.models.resnet:resnet18'
NETWORKS = {
    'resnet18': replace(BASE, sizes=(('width', 8),), **COLOURS),
    'binary': replace(BASE, name='binary_resnet18', sizes=(('width', 8),), **COLOURS),
    'torchvision': replace(BASE, name=TV, sizes=(('num_classes', 10),), size=(32, 32)),
    'timm': replace(BASE, name='timm/resnet10t', size=(32, 32), **COLOURS),
    'own class': OWN,  # with dropout
    'rods': replace(
        BASE,
        likelihood=Gaussian(2, per_dimension=True, target_mean=(30, 0), target_std=(9, 35)),
        classes=('position (mm)', 'tilt (degrees)'),
        sizes=(('width', 8),),
    ),
    'gaze': Meaning('lenet', Gaussian(2), ('pitch (rad)', 'yaw (rad)'), (36, 60), 1, 2),
}
EXPORTED = 'binary', 'timm', 'own class', 'rods', 'gaze'  # the others are ResNets as well
ALLOW = ('torchvision.models.resnet',)


def made(meaning):
    "A network with statistics that differ from their initial values, in eval mode."
    net = build_named(meaning, ALLOW).train()
    some = noise_images(meaning, 16)
    with seeded(3, 'made'), torch.no_grad():
        for _ in range(3):
            net(*next(some.batches(16)))
    return net.eval()


def packed(meaning, path, **kw):
    net = made(meaning)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('xcl.deploy.build_named', lambda meaning, allow=(): build_named(meaning, ALLOW))
        pack_network(net, meaning, path, **kw)
    return net


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_comes_back_with_its_meaning(tmp_path, name):
    meaning = replace(NETWORKS[name], provenance=dict(run='abc', teachers=['a', 'b']))
    net = packed(meaning, tmp_path / 'net.xcl')
    back, found = load(tmp_path / 'net.xcl', ALLOW)
    assert found == meaning and found.describe() == meaning.describe()
    some = noise_images(meaning)
    torch.testing.assert_close(predict(back, some), predict(net, some), rtol=1e-5, atol=1e-5)
    assert not back.training and back.meaning is found
    first = (tmp_path / 'net.xcl').read_bytes()
    packed(meaning, tmp_path / 'net.xcl')
    assert (tmp_path / 'net.xcl').read_bytes() == first


@pytest.mark.parametrize('name', EXPORTED)
def test_predictions_are_equal_packed_and_exported(tmp_path, name):
    meaning = NETWORKS[name]
    net = packed(meaning, tmp_path / 'net.xcl')
    back, _ = load(tmp_path / 'net.xcl', ALLOW)
    some = noise_images(meaning, 5)
    want = output_table(predict(net, some), meaning)
    got = predict_images(back, meaning, some.x, some.aux).drop(columns='index')
    pd.testing.assert_frame_equal(got, want, rtol=1e-4, atol=1e-6)
    assert export(back, tmp_path / 'net.pt2')
    run = torch.export.load(tmp_path / 'net.pt2').module()
    inputs = next(some.batches(5))
    pd.testing.assert_frame_equal(output_table(run(*inputs), meaning), want, rtol=1e-3, atol=1e-5)


ONNX = [importlib.util.find_spec(p) for p in ('onnx', 'onnxscript', 'onnxruntime')]


@pytest.mark.skipif(not all(ONNX), reason='onnx, onnxscript or onnxruntime is not installed')
@pytest.mark.parametrize('name', ['binary', 'own class', 'gaze'])
def test_onnx_gives_the_same_predictions(tmp_path, name):
    import onnxruntime

    meaning = NETWORKS[name]
    net = packed(meaning, tmp_path / 'net.xcl')
    assert export(load(tmp_path / 'net.xcl', ALLOW)[0], tmp_path / 'net.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'net.onnx')
    some = noise_images(meaning, 7)  # another batch size than the exporter saw
    named = dict(zip(('images', 'aux'), (v.numpy() for v in next(some.batches(7)))))
    out = torch.from_numpy(session.run(None, named)[0])
    want = output_table(predict(net, some), meaning)
    pd.testing.assert_frame_equal(output_table(out, meaning), want, rtol=1e-3, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('net.onnx')] == ['net.onnx']


def test_export_without_onnx_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None if 'onnx' in n else find(n))
    net = made(OWN)
    with pytest.raises(ImportError, match='pip install onnx onnxscript onnxruntime'):
        export(net, tmp_path / 'net.onnx', OWN)
    assert not list(tmp_path.iterdir())


# ---- what a file may not do ----


def test_a_forgotten_normalisation_is_found_when_packing(tmp_path):
    "The own class of the fault list: rebuilt without mean and std, no output agreed."
    bare = replace(OWN, mean=(), std=())
    with pytest.raises(ValueError, match='the packed file does not give the outputs'):
        pack_network(made(OWN), bare, tmp_path / 'net.xcl')
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_where_packing_fails(tmp_path):
    packed(OWN, tmp_path / 'net.xcl')
    before = (tmp_path / 'net.xcl').read_bytes()
    broken = made(OWN)
    broken.bn.running_var[0] = -1
    with pytest.raises(ValueError, match='bn.running_var holds -1; allowed: 0 or more'):
        pack_network(broken, OWN, tmp_path / 'net.xcl')
    assert (tmp_path / 'net.xcl').read_bytes() == before


def test_an_edited_class_is_refused(tmp_path, monkeypatch):
    packed(OWN, tmp_path / 'net.xcl')
    monkeypatch.setattr(own_nets.Plain, 'forward', own_nets.Dropping.forward)
    with pytest.raises(ValueError, match='source hash'):
        load(tmp_path / 'net.xcl')


MODULE = """
print('this module was run')
from torch import nn
class Net(nn.Module):
    def __init__(self, n_out):
        super().__init__()
        self.fc = nn.Linear(3, n_out)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))
"""
WRITER = """
import foreign
from xcl.deploy import pack_network
from xcl.likelihoods import Categorical
from xcl.content import content_hash
from xcl.meaning import Meaning
m = Meaning('foreign:Net', Categorical(3), tuple('abc'), (8, 8), source=content_hash(foreign.Net))
pack_network(foreign.Net(3), m, path)
"""
LOADER = """
from xcl.deploy import load
try:
    load(path)
except ValueError as e:
    print(e)
net, meaning = load(path, allow=('foreign',))
print(meaning.classes)
"""


def run_code(code, folder):
    "What a child does that has not imported `foreign`: print to a file."
    sys.path.insert(0, str(folder))
    with open(folder / 'out', 'w') as sys.stdout:
        exec(code, dict(path=folder / 'net.xcl'))


def test_no_module_is_run_that_was_not_named(tmp_path):
    (tmp_path / 'foreign.py').write_text(MODULE)

    def python(code):
        child = SERVER.Process(target=run_code, args=(code, tmp_path))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        return (tmp_path / 'out').read_text()

    python(WRITER)
    output = python(LOADER).splitlines()
    assert "pass allow=('foreign',), if you trust its code" in output[0]
    assert output[1:] == ['this module was run', "('a', 'b', 'c')"]


@pytest.mark.parametrize(
    'name', ['os:system', 'builtins:exec', 'subprocess:run', 'torch:load', 'own_nets:with_width']
)
def test_functions_are_not_called_unless_their_module_is_named(tmp_path, name):
    net = packed(OWN, tmp_path / 'net.xcl')
    state, notes = read_packed(tmp_path / 'net.xcl')
    notes['network'] = notes['network'].replace(OWN.name, name).replace(OWN.source, '')
    (tmp_path / 'net.xcl').write_bytes(packed_bytes(state, notes))
    with pytest.raises(ValueError, match='allowed: a subclass of nn.Module'):
        load(tmp_path / 'net.xcl')
    assert net is not None


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The bytes of a packed file."
    path = tmp_path_factory.mktemp('whole') / 'net.xcl'
    packed(NETWORKS['binary'], path)
    return path.read_bytes()


def corrupted(data, g):
    "A damage, drawn: cut, a flipped bit, a changed run of bytes, bytes inserted or doubled."
    i, n = int(g.integers(len(data))), int(g.integers(1, 64))
    kind = int(g.integers(6))
    if kind == 0:
        return data[:i]
    if kind == 1:
        return data[:i] + bytes([data[i] ^ 1 << int(g.integers(8))]) + data[i + 1 :]
    if kind == 2:
        noise = bytes(b ^ 1 + int(g.integers(255)) for b in data[i : i + n])
        return data[:i] + noise + data[i + n :]
    if kind == 3:
        return data[:i] + g.bytes(n) + data[i:]
    if kind == 4:
        return data + g.bytes(n)
    return data[:i] + data[i + n :]


@pytest.mark.parametrize('block', range(6))
def test_damaged_files_are_refused_by_name(tmp_path, whole, block):
    "300 damages, half of them in the header, which is where parsers fail."
    path, g = tmp_path / 'damaged.xcl', rng(1, 'damage', block)
    head = 8 + int.from_bytes(whole[:8], 'little')
    for i in range(50):
        bad = corrupted(whole[:head], g) + whole[head:] if i % 2 else corrupted(whole, g)
        if bad == whole:
            continue
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged.xcl'):
            load(path)


STATED = {
    'size': ('"size": [16, 16]', '"size": [16]'),
    'classes': ('"one"', '"one", "more"'),
    'likelihood': ('"Categorical"', '"Config"'),
    'std': ('"std": [0.2', '"std": [-0.2'),
    'json': ('"size"', 'size'),
}


@pytest.mark.parametrize('field', STATED)
def test_a_meaning_that_contradicts_itself_is_refused(tmp_path, whole, field):
    "With a digest that fits: written by other code, not damaged on the way."
    path = tmp_path / 'odd.xcl'
    path.write_bytes(whole)
    state, notes = read_packed(path)
    old, new = STATED[field]
    assert old in notes['meaning']
    path.write_bytes(packed_bytes(state, notes | dict(meaning=notes['meaning'].replace(old, new))))
    with pytest.raises(ValueError, match='odd.xcl holds no network that is known here'):
        load(path)


# ---- a run, from training to a table ----


@pytest.fixture(scope='module')
def run():
    data = image_data('digits', train_size=256)
    recipe = Recipe('sgd', 0.1, 128, 8, (3, 5, 7), gamma=0.2, weight_decay=5e-4)
    return ensure(digit_net(data, METHODS['ERM'], recipe, 1), CPU)


@pytest.fixture(scope='module')
def student(run, tmp_path_factory):
    path = tmp_path_factory.mktemp('student') / 'student.xcl'
    pack(run, path, classes=NAMES)
    return path


def test_a_folder_of_photographs_is_classified_from_the_command_line(tmp_path, run, student):
    _, val = run.cfg.data.load(CPU)
    photos = tmp_path / 'photos'
    (photos / 'below').mkdir(parents=True)
    for i in range(20):
        image = Image.fromarray(val.x[i].permute(1, 2, 0).numpy())
        image.save(photos / ('below' if i % 2 else '') / f'{i:02}.png')
    args = [sys.executable, '-m', 'xcl.predict', student, photos, '--out', tmp_path / 'a.csv']
    done = subprocess.run(args, check=True, capture_output=True, text=True)
    table = pd.read_csv(tmp_path / 'a.csv')
    order = [int(os.path.basename(f)[:2]) for f in table.file]
    out = predict(trained(run), val.take(torch.tensor(order)))
    assert '20 images' in done.stdout and sorted(order) == list(range(20))
    assert list(table['class']) == [NAMES[i] for i in out.argmax(1)]
    assert np.allclose(table.probability, out.softmax(-1).max(-1)[0], atol=1e-5)


def test_evaluate_on_the_command_line_gives_the_score_of_the_run(run, tmp_path, capsys):
    "What the command's own function prints; tests/test_committed.py calls it from a shell."
    pack(run, tmp_path / 'student.xcl')
    main([str(tmp_path / 'student.xcl'), 'digits', '--device', 'cpu'])
    score = dict(line.split(': ') for line in capsys.readouterr().out.splitlines())
    assert 'top1' in score
    for k, v in score.items():
        assert float(v.replace(',', '')) == pytest.approx(run.result[k], rel=1e-3)


def save_images(folder, n):
    "Photographs of 30 x 24 pixels, 0.png to n-1.png."
    folder.mkdir(parents=True)
    for i in range(n):
        x = rng(n, folder.name, i).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(x).save(folder / f'{i}.png')


def test_a_folder_is_evaluated_at_the_view_of_the_network(tmp_path):
    for split, n in dict(train=2, val=5).items():
        for name in 'cat', 'dog':
            save_images(tmp_path / split / name, n)
    view = dict(size=(16, 16), resize=20, how='square')
    meaning = replace(BASE, likelihood=Categorical(2), classes=('cat', 'dog'), **view)
    net = packed(replace(meaning, sizes=(('width', 4),)), tmp_path / 'net.xcl')
    score = main([str(tmp_path / 'net.xcl'), 'folder', str(tmp_path), '--device', 'cpu'])
    data = folder_data(tmp_path, CPU, size=16, resize=20, how='square')
    assert score == evaluate(net, data, CPU)


def test_a_regression_is_evaluated_on_its_folder(tmp_path):
    save_images(tmp_path / 'images', 6)
    frame = pd.DataFrame(dict(file=[f'images/{i}.png' for i in range(6)]))
    names = NETWORKS['rods'].classes
    frame[[*names]] = rng(0, 'numbers').normal(size=(6, 2))
    for split in 'train', 'test':
        frame.to_csv(tmp_path / f'{split}.csv', index=False)
    net = packed(NETWORKS['rods'], tmp_path / 'net.xcl')
    words = [str(tmp_path / 'net.xcl'), 'targets', str(tmp_path), '--device', 'cpu']
    data = target_files(tmp_path, 16)[0]
    assert main(words) == evaluate(net, data, CPU, NETWORKS['rods'].likelihood)
    frame.rename(columns={names[0]: 'height'}).to_csv(tmp_path / 'test.csv', index=False)
    frame.rename(columns={names[0]: 'height'}).to_csv(tmp_path / 'train.csv', index=False)
    with pytest.raises(ValueError, match="are .'height', 'tilt .degrees.'.; the outputs"):
        main(words)


def test_evaluate_refuses_other_names(run, student):
    names = replace(load(student)[1], classes=NAMES[::-1])
    net, meaning = load(student)
    assert evaluate(net, run.cfg.data, CPU)['top1'] == pytest.approx(run.result['top1'], abs=0.2)
    net.meaning = replace(names, classes=tuple('1023456789'))
    with pytest.raises(ValueError, match="class 0 is '0' in the data and '1' in the network"):
        evaluate(net, run.cfg.data, CPU)


def test_a_gaze_network_is_evaluated_in_degrees():
    data = eye_data('procedural', '', split=1, people=4, per_person=20, held_out=1)
    net = made(NETWORKS['gaze'])
    net.meaning = NETWORKS['gaze']
    assert 0 < evaluate(net, data, CPU)['error_deg'] < 90


def test_the_model_card_states_numbers_and_origin(run, tmp_path):
    model_card(run, tmp_path / 'card.md')
    card = (tmp_path / 'card.md').read_text()
    for words in (run.cfg.hash, run.cfg.data.digest, f'{packed_size(run)["bytes"]:,} bytes'):
        assert words in card
    assert f'| top1 | {run.result["top1"]:.4g} |' in card
    assert 'logits' in card and '(b, 3, 16, 16)' in card


def test_size_does_not_depend_on_names_and_provenance(run, tmp_path):
    "The bytes of figures are those of the network: longer class names do not change them."
    from xcl.deploy import network_bytes

    sizes = []
    for names in NAMES, tuple(100 * n for n in NAMES):
        pack(run, tmp_path / 'net.xcl', classes=names)
        sizes.append(
            (network_bytes(tmp_path / 'net.xcl'), len((tmp_path / 'net.xcl').read_bytes()))
        )
    (a, file_a), (b, file_b) = sizes
    assert a == b == packed_size(run)['bytes'] and file_b > file_a + 3000


def test_torchvision_named_by_its_function_needs_allow(tmp_path):
    packed(NETWORKS['torchvision'], tmp_path / 'net.xcl')
    with pytest.raises(ValueError, match='a function only where its module is named'):
        load(tmp_path / 'net.xcl')
    net, _ = load(tmp_path / 'net.xcl', 'torchvision.models.resnet')
    assert type(net) is type(resnet18())
