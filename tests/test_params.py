"Parameters of experiments: what is refused, and what papermill may give."

import json
from pathlib import Path

import pytest

from xcl.paper.cifar import BinaryNetParams, PyramidNetParams, ResNet18Params
from xcl.paper.params import ParameterError, Params
from xcl.paper.rows import CIFAR
from xcl.paper.smoothing import SmoothingParams
from xcl.paper.student_size import StudentSizeParams
from xcl.paper.teacher_kinds import TeachersParams
from xcl.paper.temperature import TemperatureParams

NBS = Path(__file__).resolve().parent.parent / 'nbs'
CLASSES = dict(
    resnet18=ResNet18Params,
    pyramidnet=PyramidNetParams,
    binarynet=BinaryNetParams,
    teachers=TeachersParams,
    student_size=StudentSizeParams,
    label_smoothing=SmoothingParams,
    temperature=TemperatureParams,
)
each = pytest.mark.parametrize('name', CLASSES)


def parameters_cell(name):
    "Source of the cell that papermill fills."
    cells = json.loads((NBS / f'{name}.ipynb').read_text())['cells']
    [found] = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    return ''.join(found['source'])


def cell(name):
    "The namespace that a notebook's parameters cell leaves."
    ns = {}
    exec(parameters_cell(name), ns)
    return ns


# ---- what is refused ----

SLIPS = {
    'preset None': (dict(preset=None), r'preset is None'),
    'another preset': (dict(preset='papr'), r"preset is 'papr'; allowed: 'smoke', 'demo', 'paper'"),
    'a name': (dict(sed=1), r"unknown parameter 'sed'; allowed: .*\bseed\b"),
    'two names': (dict(sed=1, bugdet=1), r"unknown parameter 'sed', 'bugdet'"),
    'text for a number': (dict(seed='x'), r"seed is 'x' \(str\); allowed: int"),
    'a fraction for a count': (dict(seeds=1.5), r'seeds is 1.5 \(float\); allowed: int'),
    'a truth value for a count': (dict(seeds=True), r'seeds is True \(bool\); allowed: int'),
    'a number for a truth value': (dict(download=1), r'download is 1 \(int\); allowed: bool'),
    'text for a truth value': (dict(download='yes'), r"download is 'yes'.*allowed: bool"),
    'a list for a text': (dict(data_dir=['a']), r"data_dir is \['a'\].*allowed: str"),
    'a truth value for a text': (dict(data_dir=True), r'data_dir is True \(bool\); allowed: str'),
    'too much': (dict(budget=7), r'budget is 7; allowed: 0.001 to 4'),
    'too little': (dict(members=0), r'members is 0; allowed: 1 to 64'),
    'not a number': (dict(budget=float('nan')), r'budget is nan.*allowed: float'),
    'infinite': (dict(budget=float('inf')), r'budget is inf.*allowed: float'),
    'no choice': (dict(store='disk'), r"store is 'disk'; allowed: 'off', 'half', 'full'"),
    'off where it is no choice': (dict(precision=False), r'precision is False.*allowed: str'),
    'another row': (dict(rows='ERM, KDD'), r"rows is 'ERM, KDD', which has 'KDD'; allowed: ERM"),
    'no row': (dict(rows=''), r"rows is ''; allowed: ERM"),
    'a row twice': (dict(rows='KD KD'), r"rows is 'KD KD'; allowed: .*each once"),
    'rows without a teacher': (dict(rows='ERM'), r"rows is 'ERM'; allowed: .*teacher"),
    'data without a folder': (dict(dataset='cifar10'), r"data_dir is '' with dataset cifar10"),
    'a folder without data': (dict(data_dir='there'), r"data_dir is 'there' with dataset digits"),
    'a size of digits': (dict(size=32), r'size is 32 with dataset digits'),
}


@pytest.mark.parametrize('slip', SLIPS)
def test_slips(slip):
    given, message = SLIPS[slip]
    with pytest.raises(ParameterError, match=message):
        ResNet18Params.of(**{'preset': 'smoke', **given})


LISTS = {
    'words': ('8 x', "widths is '8 x'"),
    'fractions': ('8.5', "widths is '8.5'"),
    'twice': ('8, 8', 'each once'),
    'nothing': ('', 'int numbers'),
    'only commas': (',', 'int numbers'),
    'zero': ('0 8', "widths is '0 8'; allowed: 1 to 1024"),
    'a truth value': (True, 'allowed: int numbers|allowed: str'),
    'a mixed list': ([8, 'x'], 'int numbers'),
}


@pytest.mark.parametrize('slip', LISTS)
def test_slips_in_lists(slip):
    given, message = LISTS[slip]
    with pytest.raises(ParameterError, match=message):
        StudentSizeParams.of(preset='smoke', widths=given)


def test_demo_sizes_are_for_digits():
    with pytest.raises(ParameterError, match='train_size of the preset demo is 128'):
        ResNet18Params.of(dataset='cifar10', data_dir='there')
    P = ResNet18Params.of(dataset='cifar10', data_dir='there', train_size=0)
    assert P.changed['train_size'] == 0


@pytest.mark.parametrize('given, message', [
    (dict(depth=12), 'depth'),
    (dict(alpha=0.5), 'alpha is 0.5; allowed: 1 to 1000'),
    (dict(width=8), "unknown parameter 'width'"),
])  # fmt: skip
def test_slips_of_pyramids(given, message):
    with pytest.raises(ParameterError, match=message):
        PyramidNetParams.of(preset='smoke', **given)


def test_slips_of_others():
    with pytest.raises(ParameterError, match="single_seed is 'full 9'.*full 4, full 8, binary 8"):
        StudentSizeParams.of(preset='smoke', single_seed='full 9')
    with pytest.raises(ParameterError, match=r"smoothing is '1'; allowed: 0.001 to 0.999"):
        SmoothingParams.of(smoothing='1')
    with pytest.raises(ParameterError, match="kinds is 'ResNet', which has 'ResNet'"):
        TeachersParams.of(kinds='ResNet')
    with pytest.raises(ParameterError, match='temperatures is'):
        TemperatureParams.of(temperatures='1,, five')


# ---- what papermill may give ----


def test_numbers_where_a_text_is_due():
    P = StudentSizeParams.of(preset='smoke', widths=16, binary_widths=[8, 16])
    assert P.widths == (16,) and P.binary_widths == (8, 16)
    assert SmoothingParams.of(smoothing=0.1).smoothing == (0.1,)
    folder = ResNet18Params.of(dataset='cifar10', data_dir=2024, train_size=0)
    assert folder.data_dir == '2024'


@pytest.mark.parametrize('text', ['4 8', '4,8', '4, 8', ' 4  8 '])
def test_commas_and_spaces(text):
    assert StudentSizeParams.of(preset='smoke', widths=text).widths == (4, 8)


def test_yaml_makes_off_false():
    assert ResNet18Params.of(store=False).store == 'off'


def test_papermill_leaves_names_of_its_own():
    ns = cell('resnet18') | dict(PAPERMILL_OUTPUT_PATH='a', PAPERMILL_INPUT_PATH='b', _='', In=[])
    assert ResNet18Params.read(ns).seed == 1
    with pytest.raises(ParameterError, match="unknown parameter 'papermill_x'"):
        ResNet18Params.read(cell('resnet18') | dict(papermill_x=1))


def test_the_cell_may_run_again_in_a_live_kernel():
    ns = cell('resnet18')
    ResNet18Params.read(ns)
    assert ResNet18Params.read(ns | dict(fig=None, text='of a later cell')).seed == 1


def test_demo_is_smoke_under_nbdev_test(monkeypatch, capsys):
    monkeypatch.setenv('IN_TEST', '1')
    assert ResNet18Params.read(cell('resnet18')).preset == 'smoke'
    assert 'runs as smoke' in capsys.readouterr().out
    assert (
        ResNet18Params.read(cell('resnet18') | dict(preset='paper', dataset='digits')).preset
        == 'paper'
    )
    assert ResNet18Params.of().preset == 'demo', 'only a notebook is changed'


# ---- notebooks and classes ----


@each
def test_the_cell_has_the_parameters_of_its_class(name):
    "The same names; and at the cell's values, those of the class's presets."
    ns, kind = cell(name), CLASSES[name]
    names = [n for n in ns if not n.startswith('__')]
    fields = set(kind.__dataclass_fields__)
    assert set(names) <= fields
    assert fields - set(names) <= {'rows'}, 'all but rows that a section fixes'
    for preset in ('smoke', 'demo'):
        assert kind.read(dict(ns, preset=preset)).changed == {}


@each
def test_papermill_can_read_the_comments(name):
    "A second `=` in a line makes papermill warn of an unknown parameter."
    lines = parameters_cell(name).splitlines()
    assert len(lines) > 5 and not [o for o in lines if '=' in o.partition('  # ')[2]]


@each
def test_parameters_can_be_given_again(name):
    P = CLASSES[name].of(preset='smoke', seed=3, budget=0.01)
    assert P.changed == dict(seed=3, budget=0.01)
    again = CLASSES[name].of(**json.loads(json.dumps(P.to_dict())))
    assert again == P


@each
def test_the_paper_preset_is_the_recipe(name):
    P = CLASSES[name].of(preset='paper', data_dir='there')
    assert P.dataset == 'cifar100' and P.budget == 1 and P.members == 8 and P.train_size == 0


def test_a_parameter_means_the_same_everywhere():
    "Type, range and choices of a name are those of every other notebook."
    seen = {}
    for kind in CLASSES.values():
        for name, f in kind.__dataclass_fields__.items():
            rule = f.type, *(f.metadata[k] for k in ('low', 'high', 'choices'))
            assert seen.setdefault(name, rule) == rule, name


def test_parameters_are_frozen():
    P = ResNet18Params.of(preset='smoke')
    with pytest.raises(AttributeError):
        P.width = 3
    assert isinstance(P, Params) and P.rows['KD'] == CIFAR['KD']
