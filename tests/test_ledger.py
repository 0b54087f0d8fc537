"The ledger: the records of the repository are read, and damage is named."

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from xcl.paper.ledger import (
    RUN_COLUMNS,
    collect_records,
    collect_runs,
    facts_of,
    write_records,
)
from xcl.paper.stats import RECORD_COLUMNS, record


@pytest.fixture(scope='module')
def committed(root):
    "Runs in the checkout's records."
    return collect_runs([root / 'outputs'])


def test_records_of_the_repository_are_read(root, committed):
    hashes = set()
    for path in (root / 'outputs').rglob('records.json'):
        for run in json.loads(path.read_text())['runs']:
            config = run['config']
            kinds = config.get('likelihood', {}).get('kind'), config.get('data', {}).get('kind')
            if kinds == ('Categorical', 'ImageData'):
                hashes.add(run['hash'])
    assert len(hashes) > 100
    assert set(committed.hash) == hashes
    assert committed.attrs['skipped'] == []
    assert list(committed.columns) == list(RUN_COLUMNS)


def test_numbers_are_those_of_the_files(root, committed):
    path = root / 'outputs' / 'student_size' / 'sizes_five_seeds' / 'records.json'
    runs = {r['hash']: r for r in json.loads(path.read_text())['runs']}
    lines = committed[committed.hash.isin(list(runs))]
    assert len(lines) == len(runs)
    for line in lines.itertuples():
        run = runs[line.hash]
        assert line.top1 == run['result']['top1']
        assert line.seed == run['config']['seed']
        assert line.epochs == run['config']['recipe']['epochs']
        assert line.members == len(run['config']['teachers'])
        assert line.eps == run['config']['likelihood']['eps']
        if 'teacher_top1' in run:
            assert line.teacher_top1 == run['teacher_top1']


def test_a_setting_differs_in_seeds_only(committed):
    for _, runs in committed.groupby('setting'):
        assert runs.seed.is_unique
        assert len({*map(str, runs.method), *map(str, runs.epochs)}) == 2
        without_seed = {json.dumps(f['recipe'], sort_keys=True) for f in runs.facts}
        assert len(without_seed) == 1


def test_members_are_recognised_by_content(committed):
    "The teacher's members stand among the runs, and each student names them."
    taught = committed[committed.members > 0]
    named = {content for row in taught.teacher_content for content in row}
    assert named <= set(committed.content)
    assert set(committed[committed.content.isin(named)].method) <= {
        'CutMix',
        'ERM',
        'LS',
        'MixUp',
    }


def test_records_written_now_are_read_back(tmp_path):
    records = pd.DataFrame(record('gaze', 'KD', 1, error_deg=5.25) + record('gaze', 'KD', 2, ece=1))
    write_records(records, [], tmp_path / 'records.json')
    back = collect_records([tmp_path])
    pd.testing.assert_frame_equal(back[list(RECORD_COLUMNS)], records)
    assert set(back.file) == {'records.json'}
    assert json.loads((tmp_path / 'records.json').read_text())['version'] == '0.2'
    with pytest.raises(ValueError):
        write_records(records.assign(value=np.inf), [], tmp_path / 'records.json')
    pd.testing.assert_frame_equal(collect_records([tmp_path]), back)  # the old file is whole


@pytest.fixture
def copy(root, tmp_path):
    "A committed record to damage."
    source = root / 'outputs' / 'resnet18' / 'demo' / 'records.json'
    return Path(shutil.copy(source, tmp_path / source.name))


DAMAGE = {
    'cut': lambda text: text[: len(text) // 2],
    'empty': lambda text: '',
    'html': lambda text: '<html>not found</html>',
    'list': lambda text: '[]',
    'null': lambda text: 'null',
    'no records': lambda text: text.replace('"records"', '"numbers"'),
    'no runs': lambda text: text.replace('"runs"', '"jobs"'),
    'no hash': lambda text: text.replace('"hash"', '"name"'),
    'no seed': lambda text: text.replace('"seed"', '"sed"'),
    'no top1': lambda text: text.replace('"top1": ', '"top2": '),
}


# a config that `from_dict` refuses may be of other code, so its run is left out and listed
UNKNOWN = {
    'no recipe': lambda text: text.replace('"recipe"', '"cake"'),
    'text for a number': lambda text: text.replace('"epochs": ', '"epochs": "many", "old": '),
    'no data': lambda text: text.replace('"source"', '"sauce"'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_named(copy, damage):
    with open(copy) as f:
        text = f.read()
    with open(copy, 'w') as f:
        f.write(DAMAGE[damage](text))
    assert DAMAGE[damage](text) != text
    with pytest.raises(ValueError, match='records.json'):
        collect_runs([copy.parent])
        collect_records([copy.parent])


@pytest.mark.parametrize('damage', UNKNOWN)
def test_unknown_configs_are_listed(copy, damage):
    text = copy.read_text()
    count = len(collect_runs([copy.parent]))
    copy.write_text(UNKNOWN[damage](text))
    left = collect_runs([copy.parent])
    assert len(left) + len(left.attrs['skipped']) == count and left.attrs['skipped']
    assert {file for file, _ in left.attrs['skipped']} == {str(copy)}


def test_other_files_are_not_touched(tmp_path):
    (tmp_path / 'my-notes.json').write_text('{')
    (tmp_path / 'table.csv').write_text('a,b')
    assert len(collect_runs([tmp_path])) == len(collect_records([tmp_path])) == 0


def test_facts_of_a_given_teacher():
    given = dict(kind='Given', name='timm/resnet50', classes=100, sizes=[])
    assert facts_of(given) == dict(net='timm/resnet50', sizes={}, given=True)
