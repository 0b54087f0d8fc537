"""Content hashes and configs: what changes a name, what does not, and what is refused."""

import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from xcl.config import Config, config_kinds, content_hash, from_dict, rng_key, seeded
from xcl.likelihoods import Categorical
from xcl.source import is_own, is_xcl, normalised
from xcl.transfer import MixUp

# ---- source code ----

FILES = {
    'shapes.py': """
import math
from functools import lru_cache, wraps
import torch
from torch import nn
from torch.nn import functional as F
import blocks
from blocks import SCALE, Block as Stage

WIDTH = 12
act = torch.relu
unused = 5
stages = [WIDTH, {'deep': 4}]

def marked(f):
    @wraps(f)
    def inner(*args):
        return f(*args)
    return inner

@marked
def shift(x):
    return x + math.pi * SCALE

class Net(Stage):
    "A network."
    depth = 2

    def __init__(self, n_out=3):
        super().__init__()
        self.head = nn.Linear(WIDTH, n_out)

    @torch.no_grad()
    def forward(self, x):
        unused = [x for x in range(3)]  # a local name, as the module has one
        return act(shift(self.head(blocks.double(x))))

    @property
    def size(self):
        from blocks import late
        return late(self), stages

class Outer:
    class Inner:
        def f(self):
            return WIDTH

def closed(k):
    class Local(nn.Module):
        def forward(self, x):
            return k * x
    return Local

twice, thrice = lambda x: 2 * x, lambda x: 3 * x
""",
    'blocks.py': """
from torch import nn

SCALE = 2.0
log = []

def double(x):
    return 2 * x

def late(net):
    return 1

def never(x):
    return x

class Block(nn.Module):
    def reset(self):
        self.apply(print)

    def later(self):
        return log.append(1)
""",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    "A function (edits of shapes.py and blocks.py) -> the module shapes, from new files."
    count = iter(range(100))

    def load(*edits):
        folder = tmp_path / f'version{next(count)}'
        folder.mkdir()
        for name, text in FILES.items():
            for old, new in edits:
                text = text.replace(old, new)
            (folder / name).write_text(text)
        for name in 'shapes', 'blocks':
            sys.modules.pop(name, None)
        monkeypatch.setattr(sys, 'path', [str(folder), *sys.path])
        importlib.invalidate_caches()
        return importlib.import_module('shapes')

    yield load
    for name in 'shapes', 'blocks':
        sys.modules.pop(name, None)


SAME = {
    'a comment': ('depth = 2', 'depth = 2  # deep'),
    'a docstring': ('"A network."', '"Another text."'),
    'layout': ('return 2 * x', 'return (2\n            * x)'),
    'an unused function': ('def never(x):\n    return x', 'def never(x):\n    return -x'),
    'a module variable under the name of a local one': ('unused = 5', 'unused = 6'),
    'lines above': ('WIDTH = 12', '\n\n\nWIDTH = 12'),
}
OTHER = {
    'the method': ('self.head(', '1 + self.head('),
    'a constant': ('WIDTH = 12', 'WIDTH = 13'),
    'an imported constant': ('SCALE = 2.0', 'SCALE = 2.5'),
    'a class attribute': ('depth = 2', 'depth = 3'),
    'the base, under another name': ('self.apply(print)', 'self.apply(id)'),
    'a function of an imported module': ('return 2 * x', 'return 3 * x'),
    'a function behind a decorator': ('x + math.pi', 'x - math.pi'),
    'the decorator': ('return f(*args)', 'return f(*args) + 0'),
    'an alias of an installed function': ('act = torch.relu', 'act = torch.tanh'),
    'a function imported inside a method': ('return 1', 'return 4'),
    'a list': ("'deep': 4", "'deep': 5"),
    'a default': ('n_out=3', 'n_out=4'),
}


@pytest.mark.parametrize('edit', SAME.values(), ids=SAME)
def test_an_edit_that_is_no_code_keeps_the_hash(modules, edit):
    before = content_hash(modules().Net)
    assert content_hash(modules(edit).Net) == before


@pytest.mark.parametrize('edit', OTHER.values(), ids=OTHER)
def test_an_edit_of_code_changes_the_hash(modules, edit):
    before = content_hash(modules().Net)
    assert content_hash(modules(edit).Net) != before
    assert content_hash(modules().Net) == before


def test_swapped_helpers_are_another_class(modules):
    "The same functions under exchanged names."
    swap = ('shift(self.head(blocks.double(x)))', 'blocks.double(self.head(shift(x)))')
    assert content_hash(modules().Net) != content_hash(modules(swap).Net)


def test_a_method_that_is_added_later_counts(modules):
    shapes = modules()
    before = content_hash(shapes.Net)
    shapes.Net.forward = lambda self, x: x
    added = content_hash(shapes.Net)
    assert added != before
    shapes.Net.forward = lambda self, x: -x
    assert content_hash(shapes.Net) not in (before, added)


def test_a_list_that_grows_in_the_process_keeps_the_hash(modules):
    shapes = modules()
    before = content_hash(shapes.Net)
    shapes.Net().later()
    shapes.stages.append(7)
    assert content_hash(shapes.Net) == before


def test_nested_and_local_classes(modules):
    shapes = modules()
    inner = content_hash(shapes.Outer.Inner)
    assert inner != content_hash(modules(('WIDTH = 12', 'WIDTH = 13')).Outer.Inner)
    assert content_hash(shapes.closed(2)) == content_hash(shapes.closed(2))
    assert content_hash(shapes.closed(2)) != content_hash(shapes.closed(3))


def test_two_lambdas_on_one_line(modules):
    shapes = modules()
    again = modules()
    hashes = [content_hash(o) for o in (shapes.twice, shapes.thrice, again.twice, again.thrice)]
    assert hashes[:2] == hashes[2:] and hashes[0] != hashes[1]


def test_an_edited_file_is_read_when_it_is_imported_anew(modules):
    "The old text, which `linecache` has kept, is not used."
    shapes = modules()
    before, path = content_hash(shapes.Net), shapes.__file__
    with open(path) as f:
        text = f.read()
    with open(path, 'w') as f:
        f.write(
            '# a new first line, so that size and time differ\n'
            + text.replace('depth = 2', 'depth = 20')
        )
    importlib.invalidate_caches()
    assert content_hash(importlib.reload(shapes).Net) != before


def test_a_file_that_was_edited_after_its_import_is_refused(modules):
    shapes = modules()
    with open(shapes.__file__, 'w') as f:
        f.write('x = 1\n')
    with pytest.raises(ValueError, match='edited after the import, start Python again'):
        content_hash(shapes.shift)


def run(*words, cwd=None):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd)


CODE = """
from torch import nn
from xcl.config import content_hash
class Tiny(nn.Module):
    def forward(self, x): return x
class Bare(nn.Module):
    width = 3
print(content_hash(Tiny), content_hash(Bare))
"""


def test_script_module_and_cell_agree(tmp_path):
    "The same class in a script, a module, a file run under IPython as one cell."
    (tmp_path / 'tiny.py').write_text(CODE)
    shell = (
        'from IPython.core.interactiveshell import InteractiveShell as S; '
        'r = S.instance().run_cell(open("tiny.py").read()); r.raise_error()'
    )
    ways = ['tiny.py'], ['-c', 'import tiny'], ['-c', shell]
    output = [run(*w, cwd=tmp_path) for w in ways]
    assert not any(o.returncode for o in output), [o.stderr for o in output]
    assert len({o.stdout for o in output}) == 1 and len(output[0].stdout.split()) == 2


REFUSED = """
for o in Tiny, Bare:
    try:
        content_hash(o)
    except ValueError as e:
        print(e)
"""


def test_without_a_file_the_hash_is_refused():
    done = run('-c', CODE.replace('print(content_hash(Tiny), content_hash(Bare))', REFUSED))
    assert done.stdout.count('put the class into one of these, not into `python -c`') == 2
    assert all(f'the source of class {name}' in done.stdout for name in ('Tiny', 'Bare'))


def test_normalised_source_is_pinned():
    "Its form is the same in all versions of Python: names depend on it."
    import ast

    tree = ast.parse(
        "@d\nclass A(B, k=1):\n 'doc'\n x: int = -1\n def f(self, *a, b=None): return f'{b!r}'"
    )
    assert normalised(tree) == (
        "Module(body=[ClassDef(name='A', bases=[Name(id='B')], keywords=[keyword(arg='k', "
        "value=Constant(value=1))], body=[AnnAssign(target=Name(id='x'), "
        "annotation=Name(id='int'), value=UnaryOp(op=USub(), "
        'operand=Constant(value=1)), simple=1), '
        "FunctionDef(name='f', "
        "args=arguments(args=[arg(arg='self')], vararg=arg(arg='a'), kwonlyargs=[arg(arg='b')], "
        'kw_defaults=[Constant()]), body=[Return(value=JoinedStr(values=[FormattedValue('
        "value=Name(id='b'), conversion=114)]))])], decorator_list=[Name(id='d')])])"
    )


@pytest.mark.parametrize('o', [nn.Linear, json.loads, MixUp, content_hash, np.sum, len])
def test_installed_code_is_not_own(o):
    assert not is_own(o)


def test_a_class_of_this_file_is_own():
    assert is_own(Leaf) and not is_xcl(Leaf) and is_xcl(MixUp)


# ---- networks and numbers ----


class Leaf(nn.Module):
    def __init__(self, gain=1.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.gain = gain
        self.register_buffer('mean', torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.norm(x) * self.gain


def leaf(change=lambda net: None):
    torch.manual_seed(0)
    net = Leaf()
    change(net)
    return content_hash(net)


CHANGES = {
    'a weight': lambda n: n.norm.weight.data.add_(1),
    'a running mean': lambda n: n.norm.running_mean.add_(1),
    'a buffer that is not saved': lambda n: n.mean.add_(1),
    'dtype': lambda n: n.double(),
    'eps of a submodule': lambda n: setattr(n.norm, 'eps', 0.1),
    'an attribute': lambda n: setattr(n, 'gain', 2.0),
    'class of a submodule': lambda n: setattr(n.norm, '__class__', nn.BatchNorm2d),
    'a hook': lambda n: n.register_forward_hook(lambda *a: None),
    'its forward': lambda n: setattr(n, 'forward', lambda x: x),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_changed_network_has_another_hash(change):
    assert leaf(change) != leaf()


SAME_NETWORK = {
    'nothing': lambda n: None,
    'eval mode': lambda n: n.eval(),
    'no gradients': lambda n: n.requires_grad_(False),
    'memory layout': lambda n: setattr(
        n.norm.weight, 'data', torch.stack([n.norm.weight.data] * 2, 1)[:, 0]
    ),
}


@pytest.mark.parametrize('change', SAME_NETWORK.values(), ids=SAME_NETWORK)
def test_the_same_network_has_the_same_hash(change):
    assert leaf(change) == leaf()


def test_numbers():
    a = dict(x=np.arange(6, dtype='uint8'), y=np.arange(6))
    assert content_hash(a) == content_hash(dict(y=torch.arange(6), x=torch.arange(6).byte()))
    assert content_hash(a) != content_hash(dict(a, x=a['x'][::-1]))
    assert content_hash(a['x']) != content_hash(a['x'].tobytes())
    bf16 = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert content_hash(dict(w=bf16)) != content_hash(dict(w=bf16.half()))


@pytest.mark.parametrize('o', [3, 'text', None, [1], dict(a=1), object()])
def test_other_objects_are_refused(o):
    with pytest.raises(TypeError, match='content_hash of .*; allowed: nn.Module, class, function'):
        content_hash(o)


# ---- configs ----


@dataclass(frozen=True)
class Shelf(Config):
    books: int
    load: float = 1.5
    beside: object = None


def test_a_config_of_another_package_carries_its_source():
    plain = Shelf(3, beside=MixUp()).to_dict()
    assert plain['source'] == content_hash(Shelf)
    assert set(plain['beside']) == {'kind', *MixUp.__dataclass_fields__}


@pytest.mark.parametrize(
    'cfg', [Shelf(3), Shelf(3, 2, Categorical(10)), Shelf(1, beside=(MixUp(),))]
)
def test_from_dict_returns_the_config(cfg):
    back = from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert (back, back.hash) == (cfg, cfg.hash)
    assert from_dict(cfg.to_dict(full=False)) == cfg


def test_an_own_class_may_have_the_name_of_a_class_of_xcl():
    @dataclass(frozen=True)
    class MixUp(Config):
        alpha: float = 1.0

    assert config_kinds()['MixUp'] is not MixUp
    assert type(from_dict(MixUp().to_dict())) is MixUp
    assert MixUp().hash != config_kinds()['MixUp']().hash


SHELF = Shelf(1).to_dict()
BAD = {
    'unknown kind': (dict(kind='Ladder'), 'kind .Ladder.; known: .*--allow MODULE'),
    'no kind': (dict(books=3), "has the key .kind.; found the keys .'books'."),
    'kind that is no text': (dict(kind=3), 'has the key .kind.'),
    'another source': (dict(kind='Shelf', source='f' * 16, books=1), 'Shelf has the source ffff'),
    'source of an xcl class': (dict(kind='CutMix', source='f' * 16), 'here no class outside xcl'),
    'unknown field': (SHELF | dict(wood='oak'), 'Shelf has no field wood'),
    'missing field': ({k: v for k, v in SHELF.items() if k != 'books'}, 'Shelf lacks books'),
    'no source': (dict(kind='Shelf', books=1), "kind 'Shelf' has no source, so it is of xcl"),
}


@pytest.mark.parametrize('plain, message', BAD.values(), ids=BAD)
def test_from_dict_says_what_is_wrong(plain, message):
    with pytest.raises(ValueError, match=message):
        from_dict(plain)


@pytest.mark.parametrize('books', [True, 3.0, 3 + 0j, '3', None, np.int64(3)])
def test_a_field_refuses_other_types(books):
    with pytest.raises(TypeError, match='Shelf.books is .*; allowed: int'):
        Shelf(books)


@pytest.mark.parametrize('load', [float('nan'), float('inf')])
def test_a_field_refuses_what_is_not_finite(load):
    with pytest.raises(ValueError, match='Shelf.load is .*; allowed: finite'):
        Shelf(1, load)


def test_annotations_that_are_text_are_checked_too(tmp_path):
    code = """from __future__ import annotations
from dataclasses import dataclass
from xcl.config import Config
@dataclass(frozen=True)
class Late(Config):
    n: int
Late(True)
"""
    (tmp_path / 'late.py').write_text(code)
    assert 'Late.n is True; allowed: int' in run('late.py', cwd=tmp_path).stderr


@pytest.mark.parametrize('name', ['kind', 'source'])
def test_a_field_under_a_key_of_to_dict_is_refused(name):
    cls = dataclass(frozen=True)(type('Odd', (Config,), {'__annotations__': {name: str}}))
    with pytest.raises(TypeError, match=f"Odd has a field '{name}'"):
        cls('x')


# ---- the global generators ----


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random() for _ in range(2)]


def test_seeded_is_a_function_of_seed_stream_and_step():
    found = []
    for place in (
        (1, 'dropout', 5),
        (1, 'dropout', 5),
        (2, 'dropout', 5),
        (1, 'x', 5),
        (1, 'dropout'),
    ):
        draws()
        with seeded(*place):
            found.append(draws())
    assert found[0] == found[1]
    for k in range(3):
        assert len({str(o[k]) for o in found}) == 4


def test_seeded_puts_back_what_it_found_even_after_an_error():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    first = draws()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with pytest.raises(KeyError), seeded(1, 'x'):
        draws()
        raise KeyError
    assert draws() == first


def test_seeded_gives_the_numbers_of_version_0_1():
    g = torch.Generator().manual_seed(rng_key(7, 'init', 0) & (2**63 - 1))
    with seeded(7, 'init'):
        assert torch.equal(torch.rand(5), torch.rand(5, generator=g))
