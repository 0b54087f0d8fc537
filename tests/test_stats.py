"Statistics on simulated experiments: coverage, error rates, and the edges."

import numpy as np
import pandas as pd
import pytest

from xcl.config import rng
from xcl.paper.claims import Claim, claims, holm, verdict
from xcl.paper.sizes import size_verdict
from xcl.paper.stats import (
    NOT_RUN,
    by_seed,
    compare,
    effect,
    effects,
    gap,
    gap_reduction,
    mean_interval,
    record,
    summary,
)

EXPERIMENTS = 4000


def frame(values, metric='top1'):
    "Records: row -> {seed: value}."
    found = []
    for row, of_seed in values.items():
        for seed, value in of_seed.items():
            found += record('test', row, seed, **{metric: value})
    return pd.DataFrame(found, columns=['section', 'row', 'seed', 'metric', 'value'])


def seeds(*values):
    return dict(enumerate(values, 1))


@pytest.mark.parametrize('n', [2, 3, 4, 8])
@pytest.mark.parametrize('level', [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(n, level):
    d = -0.4 + 2 * rng(n, 'coverage').normal(size=(EXPERIMENTS, n))
    _, low, high, _ = mean_interval(d, level)
    covered = ((low < -0.4) & (high > -0.4)).mean()
    assert abs(covered - level) < 4 * np.sqrt(level * (1 - level) / EXPERIMENTS)


def test_pairing_is_what_makes_a_small_effect_visible():
    "Seeds that differ by ten points, an effect of one: paired intervals cover it and are narrow."
    g = rng(0, 'pairing')
    seed = 10 * g.normal(size=(EXPERIMENTS, 5))
    a, b = (seed + shift + 0.3 * g.normal(size=seed.shape) for shift in (1.0, 0.0))
    mean, low, high, p = mean_interval(a - b)
    assert abs(((low < 1) & (high > 1)).mean() - 0.95) < 0.014
    assert (p < 0.05).mean() > 0.9
    unpaired = mean_interval(a)[2] - mean_interval(a)[1]
    assert np.median(unpaired) > 10 * np.median(high - low)


def test_gap_to_a_shared_teacher_is_covered_for_that_teacher():
    "One teacher of 60 measured once; students of mean 57."
    g, hits = rng(0, 'shared'), 0
    for _ in range(200):
        students = 57 + 0.5 * g.normal(size=4)
        e = effect(frame({'KD': seeds(*students), 'teacher': {1: 60.0}}), 'teacher', 'KD', 'top1')
        assert e.n == 4
        hits += e.low < 3 < e.high
    assert abs(hits / 200 - 0.95) < 0.05


def test_holm_bounds_false_verdicts_and_stays_above_the_plain_p():
    g = rng(1, 'holm')
    p = mean_interval(g.normal(size=(2000, 8, 4)))[3]
    adjusted = np.array([holm(row) for row in p])
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (adjusted < 0.05).any(1).mean() < 0.05 + 0.015
    assert (p < 0.05).any(1).mean() > 0.25
    # the order of the claims makes no difference, and the order of their p is kept
    order = g.permutation(8)
    np.testing.assert_array_equal(holm(p[0][order]), adjusted[0][order])
    ranked = np.argsort(p, 1, kind='stable')
    assert (np.diff(np.take_along_axis(adjusted, ranked, 1), axis=1) >= 0).all()


def test_false_leads_at_a_size_are_rare():
    g = rng(2, 'lead')
    output = []
    for _ in range(1000):
        output.append(size_verdict(pd.DataFrame(g.normal(size=(3, 4)), columns=list('ABCD'))))
    assert np.mean([s == 'lower' for s in output]) < 0.025
    assert np.mean([s.startswith('higher') for s in output]) < 0.045


def test_one_seed_is_no_evidence():
    one = frame({'KD': {1: 50.0}, 'ERM': {1: 40.0}, 'teacher': {1: 60.0}})
    e = effect(one, 'KD', 'ERM', 'top1')
    assert (e.mean, e.n) == (10.0, 1)
    assert np.isnan([e.std, e.low, e.high, e.p]).all()
    assert verdict(e, 1.0) == 'one seed'
    reduction = gap_reduction(gap(one, 'ERM', 'top1'), gap(one, 'KD', 'top1'))
    assert np.isnan(reduction.percent) and reduction.n == 1


def test_equal_values_have_an_interval_without_width():
    equal = frame({'A': seeds(5.0, 6.0, 7.0), 'B': seeds(5.0, 6.0, 7.0), 'C': seeds(4, 5, 6)})
    with np.errstate(all='raise'):
        zero, one = effect(equal, 'A', 'B', 'top1'), effect(equal, 'A', 'C', 'top1')
    assert (zero.mean, zero.std, zero.low, zero.high, zero.p) == (0, 0, 0, 0, 1)
    assert (one.mean, one.low, one.high, one.p) == (1, 1, 1, 0)
    assert (verdict(zero, 1.0), verdict(one, -1.0)) == ('not told apart', 'contradicted')


def test_missing_seeds_are_no_pairs():
    some = frame({'A': {1: 5.0, 2: 6.0, 4: 9.0}, 'B': {2: 5.0, 3: 1.0, 4: 7.0}})
    e = effect(some, 'A', 'B', 'top1')
    assert (e.mean, e.n) == (1.5, 2)
    s = summary(some, 'top1', ('A', 'B', 'C')).set_index('row')
    assert s.n.to_dict() == {'A': 3, 'B': 3, 'C': 0}
    assert np.isnan(s['mean']['C'])
    assert effect(some, 'A', 'C', 'top1') is NOT_RUN
    assert verdict(NOT_RUN, 1.0) == 'not run'


def test_values_that_are_nan_are_not_measured():
    some = frame({'A': seeds(5.0, np.nan, 7.0), 'B': seeds(4.0, 5.0, 6.0)})
    assert effect(some, 'A', 'B', 'top1').n == 2
    assert summary(some, 'top1', ('A',)).n.item() == 2


@pytest.mark.parametrize(
    'ask',
    [
        lambda r: by_seed(r, 'top1'),
        lambda r: summary(r, 'top1', ('A',)),
        lambda r: effect(r, 'A', 'B', 'top1'),
        lambda r: compare(r, 'top1', ('A', 'B')),
    ],
)
def test_duplicates_are_refused(ask):
    twice = frame({'A': seeds(1.0, 2.0), 'B': seeds(1.0, 2.0)})
    twice = pd.concat([twice, twice[2:3]])
    with pytest.raises(ValueError, match="row 'B', seed 1 is recorded twice"):
        ask(twice)


def test_a_shared_teacher_counts_for_seeds_that_it_was_not_recorded_for():
    "Its record stands at seed 1; the student has seeds 2 and 3 only."
    records = frame({'KD': {2: 55.0, 3: 57.0}, 'teacher': {1: 60.0}})
    assert gap(records, 'KD', 'top1').to_dict() == {2: 5.0, 3: 3.0}
    table = compare(records, 'top1', ('KD', 'teacher')).set_index(['metric', 'row'])
    assert table.n['top1', 'teacher'] == 1  # and not one for each seed
    assert (table.n['gap', 'KD'], table['mean']['gap', 'KD']) == (2, 4.0)


def test_a_row_that_is_no_teacher_is_not_shared():
    records = frame({'KD': seeds(55.0, 57.0), 'ERM': {1: 50.0}})
    assert effect(records, 'KD', 'ERM', 'top1').n == 1


def test_teachers_of_their_own_are_paired_by_seed():
    records = frame({'KD': seeds(55.0, 57.0), 'teacher': seeds(60.0, 64.0)})
    assert gap(records, 'KD', 'top1').tolist() == [5.0, 7.0]
    missing = frame({'KD': seeds(55.0, 57.0, 58.0), 'teacher': seeds(60.0, 64.0)})
    assert gap(missing, 'KD', 'top1').to_dict() == {1: 5.0, 2: 7.0}


def test_reduction_needs_a_clear_gap():
    "Three seeds have t = 4.30: a mean gap of 1 with deviation 0.5 is unclear, with 0.3 clear."
    half = pd.Series([0.5, 0.5, 0.5])
    assert not gap_reduction(half, pd.Series([0.5, 1.0, 1.5])).clear
    found = gap_reduction(half, pd.Series([0.7, 1.0, 1.3]))
    assert found.clear and abs(found.percent - 50) < 1e-9
    assert not gap_reduction(half, pd.Series([-1.0, -1.0, -1.0])).clear


def test_the_papers_claims_of_section_f():
    "Numbers of the paper as if they were ours: its own verdicts, and the reduction of 59%."
    g = rng(0, 'paper')
    means = {'KD': 81.2, 'XCL-Mix': 83.2}
    values = {row: seeds(*(m + 0.1 * g.normal(size=3))) for row, m in means.items()}
    records = frame(values | {'teacher': {1: 84.6}})
    table = claims([Claim('XCL above KD', effect(records, 'XCL-Mix', 'KD', 'top1'), 2.0)])
    assert table.verdict.tolist() == ['supported']
    r = gap_reduction(gap(records, 'XCL-Mix', 'top1'), gap(records, 'KD', 'top1'))
    assert abs(r.percent - 59) < 6


def test_effects_and_claims_are_frames_of_numbers():
    records = frame({'A': seeds(5.0, 6.5, 7.0), 'B': seeds(4.0, 5.0, 6.0)})
    table = effects(records, [('A', 'B'), ('A', 'C')], 'top1')
    assert table.n.tolist() == [3, 0]
    assert table[['mean', 'low', 'high', 'p']].dtypes.map(lambda t: t.kind).tolist() == ['f'] * 4
    family = [Claim(a, effect(records, 'A', b, 'top1'), 1.0) for a, b in (('x', 'B'), ('y', 'C'))]
    judged = claims(family)
    assert judged.p_holm[0] == judged.p[0]  # a claim that was not run is not counted
    assert judged.verdict[1] == 'not run'
