"Rows, their knobs, and the numbers of the paper."

import pytest

from xcl.likelihoods import Categorical, Gaussian, Point
from xcl.objective import Both, Labels
from xcl.paper.claim_list import CLAIMS, Difference
from xcl.paper.row import Row, Rows, likelihood_of, pick_names
from xcl.paper.rows import (
    BINARY,
    CIFAR,
    GAN,
    GAZE,
    IMAGENET,
    PYRAMIDNET,
    RECIPES,
    SIZES,
    SMOOTHINGS,
    TEACHERS,
    TEMPERATURES,
)
from xcl.paper.yours import YoursParams
from xcl.train import METHODS
from xcl.transfer import CutMix, Empirical, MixUp, RandomChoice

TABLES = dict(
    CIFAR=CIFAR,
    TEACHERS=TEACHERS,
    BINARY=BINARY,
    PYRAMIDNET=PYRAMIDNET,
    GAZE=GAZE,
    IMAGENET=IMAGENET,
    GAN=GAN,
)
each = pytest.mark.parametrize('rows', TABLES.values(), ids=TABLES)


# ---- what is refused ----


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'one at least'),
        (' , ', 'one at least'),
        ('ERM, ERM', 'each once'),
        ('ERMs', "which has 'ERMs'"),
        ('erm', "which has 'erm'"),
        ('ERM; KD', "which has 'ERM; KD'"),
        ('KD T=5', "which has 'T=5'"),
        ('ERM, KD, XCL-Mixed', "which has 'XCL-Mixed'"),
    ],
)
def test_a_text_that_names_no_rows(text, message):
    with pytest.raises(ValueError, match=message) as e:
        CIFAR.pick(text)
    assert 'ERM, LS 0.1' in str(e.value), 'the message lists what is allowed'


@pytest.mark.parametrize('T', [0.5, 2, 10.0])
def test_labels_have_no_temperature(T):
    for row in ('ERM', 'MixUp', 'LS'):
        with pytest.raises(ValueError, match=f'row {CIFAR[row].base}.*allowed without a teacher'):
            CIFAR[row].at(T=T)


def test_a_teacher_has_no_smoothing():
    with pytest.raises(ValueError, match='allowed without labels'):
        CIFAR['XCL-Mix'].at(eps=0.1)


@each
def test_names_are_unique_and_kept_apart(rows):
    assert len(set(rows.names)) == len(rows)
    with pytest.raises(ValueError, match='several rows'):
        Rows((*rows, rows[0]))
    with pytest.raises(KeyError, match='no row is named'):
        rows['no such row']


@pytest.mark.parametrize('name', ['XCL-Sim', 'XCL-GAN'])
def test_a_row_of_a_generator_needs_its_set(name):
    with pytest.raises(ValueError, match=rf'row {name} has no transfer set'):
        assert GAZE[name].method
    assert GAZE[name].on(Empirical()).method.transfer == Empirical()


# ---- looking up ----


@pytest.mark.parametrize(
    'text', ['ERM, point, ERM, KD', 'ERM, point ERM KD', ' ERM, point,ERM,  KD, ']
)
def test_commas_and_spaces_separate_names_that_hold_both(text):
    assert GAZE.pick(text).names == ['ERM, point', 'ERM', 'KD']


@each
def test_all_names_in_one_text(rows):
    for separator in (', ', ' ', ','):
        assert rows.pick(separator.join(rows.names)) == rows


def test_the_longest_name_wins():
    assert pick_names('a b a', ['a', 'a b']) == ['a b', 'a']
    assert pick_names('+ CutMix, PyramidNet + CutMix', TEACHERS.names) == TEACHERS.names[3:]


# ---- knobs ----


@pytest.mark.parametrize('T, top1', [(1, 80.0), (1.5, 79.9), (2, 80.2), (5, 81.2), (10, 81.1)])
def test_table_4(T, top1):
    row = CIFAR['KD'].at(T=T)
    assert row.name == ('KD' if T == 1 else f'KD T={T:g}')
    assert row.paper['top1'][0] == top1
    assert likelihood_of(row, Categorical, classes=7).temperature == T
    assert row.method == METHODS['KD']


def test_a_knob_is_set_from_any_row_of_its_kind():
    assert CIFAR['KD'].at(T=5).at(T=2) == CIFAR['KD'].at(T=2)
    assert CIFAR['LS'].at(eps=0.4).at(eps=0.1) == CIFAR['LS']
    assert CIFAR['KD'].at(T=5).title == 'Knowledge distillation (T = 5)'
    assert CIFAR['KD'].at(T=5).at(T=1).title == CIFAR['KD'].title


def test_a_row_of_ones_own():
    own = Row('Hinton', MixUp(), Both(0.1, 0.9), eps=0.1).at(T=4)
    kind = likelihood_of(own, Categorical, classes=10, temper='mean')
    assert kind == Categorical(10, 4.0, 'mean', True, 0.1)
    assert own.name == 'Hinton T=4' and own.method.name == 'Hinton'


def test_likelihoods():
    assert likelihood_of(GAZE['ERM, point'], Gaussian) == Point()
    assert likelihood_of(GAZE['XCL-Mix'], Gaussian) == Gaussian()
    plain = likelihood_of(CIFAR['ERM'], Categorical, classes=10, temper='mean', scale_t2=True)
    assert plain == Categorical(10), 'ways to temper are no part of a run that has no teacher'


# ---- the paper's choices ----


def test_methods():
    assert {k: CIFAR[k].method for k in ('ERM', 'MixUp', 'KD', 'XCL-Mix')} == {
        k: METHODS[k] for k in ('ERM', 'MixUp', 'KD', 'XCL-Mix')
    }
    half = RandomChoice(CutMix(), Empirical())
    assert CIFAR['CutMix'].transfer == CIFAR['teacher'].transfer == half
    assert IMAGENET['CutMix'].transfer == CutMix() and IMAGENET['MixUp'].transfer == MixUp(0.2)
    assert GAZE['XCL-Mix'].transfer == MixUp() and GAZE['teacher'].method == METHODS['MixUp']
    assert IMAGENET['XCL-Mix'].recipe == (('weight_decay', 1e-5),)
    assert [r.name for r in IMAGENET if r.recipe] == ['XCL-Mix', 'XCL-GAN']


@each
def test_teachers_are_taught_by_labels(rows):
    if 'teacher' in rows:
        assert isinstance(rows['teacher'].objective, Labels)


def test_recipes():
    assert set(SIZES) <= set(RECIPES)
    steps = {k: r.steps(50_000) for k, r in RECIPES.items()}
    assert steps['resnet18'] == 156_000 and steps['pyramidnet'] == 234_300
    assert RECIPES['preact_resnet'].lr == 10 * RECIPES['lenet'].lr
    assert RECIPES['imagenet_resnet'].num_micro_batches == 8


# ---- the paper's numbers ----


@each
def test_numbers_are_pairs(rows):
    for row in rows:
        for metric, (value, std, *implied) in row.paper.items():
            assert isinstance(value, float) and (std is None or 0 < std < 1), (row.name, metric)
            assert implied in ([], [True])


def test_only_erm_is_implied():
    implied = [r.name for r in CIFAR if any(len(v) > 2 for v in r.paper.values())]
    assert implied == ['ERM']


def test_table_1_is_consistent():
    teacher = IMAGENET['teacher'].paper['top1'][0]
    gaps = {k: IMAGENET[k].paper['gap'][0] for k in ('KD', 'XCL-Mix')}
    for name, gap in gaps.items():
        assert IMAGENET[name].paper['top1'][0] == pytest.approx(teacher - gap)
    reduction = 100 * (1 - gaps['XCL-Mix'] / gaps['KD'])
    assert IMAGENET['XCL-Mix'].paper['gap_reduction'][0] == pytest.approx(reduction, abs=0.5)


def test_tables_2_and_5_agree():
    taught, mixed = TEACHERS['+ CutMix'].paper, CIFAR['XCL-Mix'].paper
    assert taught['top1'] == mixed['top1'] and taught['entropy'] == mixed['entropy']
    assert taught['teacher_top1'][0] == CIFAR['teacher'].paper['top1'][0]
    assert (
        PYRAMIDNET['teacher'].paper['top1'] == TEACHERS['PyramidNet + CutMix'].paper['teacher_top1']
    )


def test_the_reductions_of_sections_f_and_of_the_abstract():
    "Gaps from Tables 2, 4 and 5: best KD to best XCL is section F's 59%."
    gap = {
        k: CIFAR['teacher'].paper['top1'][0] - CIFAR[k].at(T=5).paper['top1'][0]
        for k in ('KD', 'XCL-Mix')
    }
    assert round(100 * (gap['XCL-Mix'] / gap['KD'] - 1)) == -59


def test_claims_name_rows_that_exist():
    warm = CIFAR + [CIFAR[k].at(T=T) for k in ('KD', 'XCL-Mix') for T in TEMPERATURES[1:]]
    unlabelled = YoursParams.of(rows='KD + unlabelled, XCL-Mix + unlabelled', unlabelled_dir='more')
    known = dict(
        gaze=GAZE,
        resnet18=CIFAR,
        pyramidnet=PYRAMIDNET,
        binarynet=BINARY,
        label_smoothing=CIFAR + [CIFAR['LS'].at(eps=e) for e in SMOOTHINGS[1:]],
        temperature=warm,
        teachers=TEACHERS,
        imagenet=IMAGENET,
        gan=GAN,
        few_images=CIFAR,
        yours=CIFAR + list(unlabelled.rows),
    )
    differences = [c for c in CLAIMS if isinstance(c.ask, Difference)]
    assert len(differences) > 20
    for claim in differences:
        others = claim.ask.other if isinstance(claim.ask.other, tuple) else (claim.ask.other,)
        for notebook in claim.at:
            assert {claim.ask.row, *others} <= set(known[notebook].names), claim
