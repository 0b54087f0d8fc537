"The ledger of claims: what is committed follows from the committed records, verdicts included."

import json
import re
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from xcl.config import rng
from xcl.data import CropFlip
from xcl.files import write_json
from xcl.images import ImageData
from xcl.likelihoods import Categorical
from xcl.nets import net
from xcl.paper import results
from xcl.paper.claim_list import CLAIMS, Difference, Narrower, PaperClaim
from xcl.paper.claims import VERDICTS, holm
from xcl.paper.evidence import SCALES, Setting, collect_settings, distance
from xcl.paper.ledger import write_records
from xcl.paper.rows import RECIPES
from xcl.paper.stats import effect_of, mean_interval, record
from xcl.paper.verdicts import (
    COLUMNS,
    glance_table,
    headlines,
    make_ledger,
    verdict_table,
    with_glance,
)
from xcl.train import METHODS, Train


@pytest.fixture(scope='module')
def settings():
    return collect_settings()


@pytest.fixture(scope='module')
def ledger(settings):
    return make_ledger(settings)


def test_the_committed_ledger_is_what_the_records_give(root, ledger):
    text = (root / 'outputs' / 'ledger.csv').read_text(encoding='utf-8')
    assert text == results.ledger_text(ledger), 'run python -m xcl.paper.results'


def test_pandas_reads_the_ledger(root, ledger):
    frame = pd.read_csv(root / 'outputs' / 'ledger.csv')
    assert tuple(frame.columns) == COLUMNS and len(frame) == len(ledger)
    assert set(frame.verdict) <= set(VERDICTS)
    assert set(frame.scale.dropna()) <= set(SCALES)


def test_the_table_of_readme_is_that_of_the_ledger(root, ledger, settings):
    text = (root / 'README.md').read_text(encoding='utf-8')
    table = glance_table(ledger, settings)
    assert with_glance(text, table) == text, 'run python -m xcl.paper.results'
    assert 6 <= len(table.splitlines()) - 2 <= 10


def test_a_claim_has_no_place_for_a_verdict():
    assert 'verdict' not in {f.name for f in fields(PaperClaim)}


def test_verdicts_follow_from_the_numbers(ledger):
    "Written again here, from the columns alone."
    for _, together in ledger.groupby(['family', 'scale']):
        np.testing.assert_allclose(together.p_holm, holm(together.p))
    wanted = np.select(
        [ledger.n == 0, ledger.n == 1, ~(ledger.p_holm < 0.05), ledger.effect > 0],
        ['not run', 'one seed', 'not told apart', 'supported'],
        'contradicted',
    )
    assert ledger.verdict.tolist() == wanted.tolist()


def test_effects_are_those_of_the_records(settings, ledger):
    "Read from the records by pandas alone, for the plain differences of accuracies."
    asks = {(c.family, c.text): c.ask for c in CLAIMS}
    by_label, seen = {s.label: s for s in settings}, 0
    for line in ledger[ledger.n > 0].itertuples():
        ask = asks[line.family, line.claim]
        plain = isinstance(ask, Difference) and isinstance(ask.other, str) and not ask.relative
        if not plain:
            continue
        frame = by_label[line.setting].records
        wide = frame[frame.metric == ask.metric].pivot(index='seed', columns='row', values='value')
        gain = (wide[ask.row] - wide[ask.other]).dropna()
        sign = -1 if ask.metric == 'ece' else 1
        assert line.effect == pytest.approx(sign * gain.mean()) and line.n == len(gain)
        seen += 1
    assert seen > 20


def test_what_made_a_line_is_named(settings, ledger):
    measured = ledger[ledger.n > 0]
    assert measured.commit.str.match(r'[0-9a-f]{12}').all()
    with_runs = {s.label for s in settings if s.runs}
    known = {s.label: {run['hash'] for run in s.runs} for s in settings}
    for line in measured.itertuples():
        hashes = set(line.hashes.split())
        assert hashes <= known[line.setting]
        assert bool(hashes) == (line.setting in with_runs), line
    two_rows = measured[measured.claim == 'KD - ERM']
    some = two_rows[two_rows.hashes != '']
    assert (some.hashes.str.split().str.len() == 2 * some.n).all()


def test_links_of_the_page_lead_somewhere(root, ledger, settings):
    links = re.findall(r'\]\(([^)]+)\)', verdict_table(ledger, settings, 'outputs/'))
    assert links and all((root / link).exists() for link in links)


# ---- made-up settings ----


def made_up(name, scores, metric='top1', notebook='resnet18'):
    "A setting: row -> {seed: score}."
    lines = []
    for row, values in scores.items():
        for seed, value in values.items():
            lines += record('t', row, seed, **{metric: value})
    return Setting(notebook, name, pd.Series(dtype=object), pd.DataFrame(lines), [])


@pytest.fixture
def folder(tmp_path):
    "A folder of results to be filled by `put`."

    def put(name, scores, notebook='resnet18', metric='top1'):
        lines = []
        for row, values in scores.items():
            for seed, value in values.items():
                lines += record('t', row, seed, **{metric: value})
        path = tmp_path / notebook / name / 'records.json'
        path.parent.mkdir(parents=True)
        write_records(pd.DataFrame(lines), [], path)

    put.root = tmp_path
    return put


def seeds(*values):
    return dict(enumerate(values, 1))


def line_of(ledger, claim, family):
    return ledger[(ledger.claim == claim) & (ledger.family == family)]


def test_missing_seeds_make_no_pairs(folder):
    folder('demo', {'KD': {1: 50.0, 2: 51.0}, 'XCL-Mix': {2: 52.0, 3: 60.0}})
    ledger = make_ledger(collect_settings(folder.root))
    line = line_of(ledger, 'XCL-Mix - KD', 'ResNet-18')
    assert (line.n.item(), line.effect.item(), line.verdict.item()) == (1, 1.0, 'one seed')
    assert line.low.isna().item() and line.p_holm.isna().item()
    others = ledger[ledger.n == 0]
    assert len(others) == len(CLAIMS) - 1 and set(others.verdict) == {'not run'}


def test_equal_scores_are_not_told_apart(folder):
    folder('demo', {'KD': seeds(50, 51, 52), 'XCL-Mix': seeds(50, 51, 52)})
    line = line_of(make_ledger(collect_settings(folder.root)), 'XCL-Mix - KD', 'ResNet-18')
    assert (line.effect.item(), line.p.item(), line.verdict.item()) == (0, 1, 'not told apart')


def test_a_demo_changes_nothing_about_a_campaign(folder):
    folder('big', {'KD': seeds(50, 51, 52), 'XCL-Mix': seeds(52.0, 53.1, 54.2)})
    before = make_ledger(collect_settings(folder.root))
    folder('demo', {'KD': seeds(50, 51, 52), 'XCL-Mix': seeds(40.0, 43, 45), 'ERM': seeds(1, 2, 4)})
    after = make_ledger(collect_settings(folder.root))
    claim = 'XCL-Mix - KD', 'ResNet-18'
    first, second = (headlines(o) for o in (before, after))
    pd.testing.assert_series_equal(
        line_of(first, *claim).iloc[0], line_of(second, *claim).iloc[0], check_names=False
    )
    assert line_of(second, *claim).verdict.item() == 'supported'
    assert 'contradicted' in set(line_of(after, *claim).verdict)


def test_smoke_is_no_result(folder):
    folder('smoke-123abc', {'KD': seeds(1, 2), 'XCL-Mix': seeds(3, 4)})
    assert collect_settings(folder.root) == []


def test_a_score_that_stands_twice_is_refused(folder, tmp_path):
    folder('demo', {'KD': seeds(1, 2), 'XCL-Mix': seeds(3, 4)})
    path = tmp_path / 'resnet18' / 'demo' / 'records.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(records=2 * content['records'])))
    with pytest.raises(ValueError, match='recorded twice'):
        make_ledger(collect_settings(folder.root))


def classifiers(path, **data):
    "A file of records of two ERM students of section A.2, on some data."
    images = ImageData('cifar100', 100, augment=CropFlip(), **data)
    records, runs = [], []
    for seed in (1, 2):
        parts = net('resnet18', width=64), Categorical(100), images, METHODS['ERM']
        cfg = Train(*parts, RECIPES['resnet18'], seed)
        made = dict(commit='0123456789ab', dirty=False, xcl='0.2.0')
        result = dict(top1=77.0 + seed, val_loss=1.0)
        runs.append(dict(hash=cfg.hash, config=cfg.to_dict(), result=result, provenance=made))
        records += record('resnet18', 'ERM', seed, **result)
    path.parent.mkdir(parents=True)
    write_json(path, dict(version='0.2', records=records, runs=runs))


def test_only_the_recipe_of_the_paper_is_the_full_recipe(tmp_path):
    classifiers(tmp_path / 'resnet18' / 'whole' / 'records.json')
    classifiers(tmp_path / 'resnet18' / 'small' / 'records.json', train_size=2500)
    classifiers(tmp_path / 'resnet18' / 'demo' / 'records.json')
    scales = {s.name: distance(s).scale for s in collect_settings(tmp_path)}
    assert scales == dict(whole='full recipe', small='campaign', demo='demo')


# ---- simulated ----


def test_relative_gains_are_covered():
    "Errors of about 8 degrees, the row 10% below the other: the interval holds 10% as often as it says."
    g, hits = rng(0, 'relative'), 0
    ask = Difference('A', 'B', 'error_deg', relative=True)
    for _ in range(200):
        other = 8 + 0.5 * g.normal(size=4)
        row = other * (0.9 + 0.02 * g.normal(size=4))
        gains = ask.gains(made_up('t', {'A': seeds(*row), 'B': seeds(*other)}, 'error_deg'))
        e = effect_of(gains.by_seed)
        hits += e.low < 10 < e.high
    assert abs(hits / 200 - 0.95) < 0.055


def test_two_ranges_of_noise_are_not_told_apart():
    "A range is biased by noise, the difference of two is not: false alarms stay near 5%."
    g = rng(1, 'range')
    d = np.ptp(g.normal(size=(4000, 3, 5)), 2) - np.ptp(g.normal(size=(4000, 3, 5)), 2)
    assert abs((mean_interval(d)[3] < 0.05).mean() - 0.05) < 0.015
    ask = Narrower(('A', 'B'), ('C', 'D'))
    found = ask.gains(made_up('t', {k: seeds(*v) for k, v in zip('ABCD', g.normal(size=(4, 3)))}))
    assert len(found.by_seed) == 3 and found.rows == ('A', 'B', 'C', 'D')


def test_the_command_finds_what_is_out_of_date(root, tmp_path, monkeypatch):
    "In a copy of README and the ledger: --check fails, the command mends, --check passes."
    (tmp_path / 'outputs').mkdir()
    readme = (root / 'README.md').read_text(encoding='utf-8')
    (tmp_path / 'README.md').write_text(with_glance(readme, 'old'))
    monkeypatch.setattr(results, 'root', lambda: tmp_path)
    with pytest.raises(SystemExit, match='is not what outputs say'):
        results.main(['--check'])
    assert not (tmp_path / 'outputs' / 'ledger.csv').exists()
    results.main([])
    results.main(['--check'])
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == readme
