"Showing: text of numbers, names, folders that are never overwritten, captions, private images."

import string

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from xcl.files import home
from xcl.paper.show import (
    LONGEST_NAME,
    MACHINE,
    Column,
    Page,
    caption,
    file_name,
    format_mean_std,
    format_table,
    output_folder,
    provenance_line,
)
from xcl.paper.stats import compare, record, summary

PARAMS = dict(preset='demo', seed=1, seeds=3, rows='ERM, KD', budget=0.5, device='cpu', data_dir='')


@pytest.fixture
def records():
    found = record('t', 'teacher', 1, top1=66.0)
    for row, values in {'ERM': (50, 60), 'KD': (52, 63)}.items():
        for seed, value in enumerate(values, 1):
            found += record('t', row, seed, top1=value)
    return pd.DataFrame(found)


def figure():
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot((0, 1), (0, 1))
    return fig


@pytest.mark.parametrize(
    'given, text',
    [
        (dict(mean=58.0, std=1.0, n=3), '58.00 ± 1.00 (3)'),
        (dict(mean=58.0, n=1), '58.00 (1)'),
        (dict(mean=80.2, std=0.1, digits=1), '80.2 ± 0.1'),
        (dict(mean=-3.456, std=0.5, n=2, digits=1, sign='+'), '-3.5 ± 0.5 (2)'),
        (dict(mean=3.0, n=2, sign='+'), '+3.00 (2)'),
        (dict(mean=np.nan, n=0), '-'),
        (dict(mean=None), '-'),
        (dict(mean=1.0, std=0.0, n=3), '1.00 ± 0.00 (3)'),
    ],
)
def test_numbers_as_text(given, text):
    assert format_mean_std(**given) == text


def test_table_of_text(records):
    paper = {'ERM': {'top1': (77.8, None, True)}, 'KD': {'top1': (80.0, 0.2), 'gap': (4.6, None)}}
    table = compare(records, 'top1', ('ERM', 'KD', 'teacher'), paper)
    text = format_table(table)
    assert list(text['paper: top-1 (%)']) == ['≈ 77.8', '80.0 ± 0.2', '-']
    assert list(text['gap to the teacher (points)']) == ['11.00 ± 7.07 (2)', '8.50 ± 7.78 (2)', '-']
    assert list(text['paper: gap to the teacher (points)']) == ['-', '4.6', '-']
    assert list(text['against ERM (points)']) == ['-', '+2.50 ± 0.71 (2)', '+11.00 ± 7.07 (2)']
    assert text['gap reduction against KD (%)'].tolist() == ['no clear gap', '-', '-']
    assert text.loc['teacher', 'top-1 (%)'] == '66.00 (1)'
    assert not any('nan' in cell.lower() for column in text for cell in text[column])


def test_columns_can_be_chosen(records):
    table = compare(records, 'top1', ('KD', 'ERM'))
    text = format_table(table, [Column('gap', 'lacking', 0), 'top1'], 'method')
    assert list(text.columns) == ['lacking', 'top-1 (%)']
    assert (list(text.index), text.index.name) == (['KD', 'ERM'], 'method')
    assert (
        format_table(table, [Column('top1', paper=True)])['paper: top-1 (%)'].tolist() == ['-'] * 2
    )


TITLES = (
    'Top-1 accuracy (%)',
    'Ĥ over λ, ε and σ²',
    '../../etc/passwd',
    'a' * 200,
    'Größe: MB\nund Breite',
    'CON',
    '  spaces  ',
    '日本 1',
)


@pytest.mark.parametrize('title', TITLES)
def test_names_are_short_and_plain(title):
    name = file_name(title)
    assert 0 < len(name) <= LONGEST_NAME
    assert set(name) <= set(string.ascii_lowercase + string.digits + '-')
    assert not name.startswith('-') and not name.endswith('-')
    assert name == file_name(title)


def test_long_titles_with_one_beginning_differ():
    long = 'Error over the size of the file of students in full precision and binary '
    names = {file_name(long + str(i)) for i in range(50)}
    assert len(names) == 50


@pytest.mark.parametrize('title', ['', '...', '日本'])
def test_titles_without_a_name_are_refused(title):
    with pytest.raises(ValueError, match='at least one letter or digit'):
        file_name(title)


def test_one_file_for_one_title(tmp_path):
    page = Page(tmp_path, 'demo')
    page.show(figure(), 'Top-1')
    page.show(figure(), 'Top-1')  # the same cell again
    with pytest.raises(ValueError, match='rename one'):
        page.show(pd.DataFrame(), 'top 1')


@pytest.mark.parametrize(
    'change',
    [
        dict(budget=0.25),
        dict(rows='ERM KD'),
        dict(seed=2),
        dict(preset='paper'),
        dict(lam=1.0),
        dict(budget='0.5'),
        dict(seeds=None),
    ],
)
def test_other_parameters_have_another_folder(change):
    assert output_folder('gaze', 'demo', PARAMS) != output_folder('gaze', 'demo', PARAMS | change)
    output_folder('gaze', 'demo', PARAMS, 'named')
    with pytest.raises(FileExistsError, match='holds results of other parameters') as e:
        output_folder('gaze', 'demo', PARAMS | change, 'named')
    assert next(iter(change)) in str(e.value)
    assert yaml.safe_load((home() / 'reports/gaze/named/params.yaml').read_text())['budget'] == 0.5


def test_other_data_have_another_folder():
    at = dict(PARAMS, data_dir='/a/photos')
    one = output_folder('gaze', 'demo', at, data='d1')
    assert output_folder('gaze', 'demo', at, data='d2') != one
    assert output_folder('gaze', 'demo', at | dict(data_dir='/b/photos'), data='d1') == one
    output_folder('gaze', 'demo', at, 'named', data='d1')
    with pytest.raises(FileExistsError, match="data: 'd1' there, 'd2' now"):
        output_folder('gaze', 'demo', at, 'named', data='d2')
    with pytest.raises(ValueError, match="allowed: the data's digest"):
        output_folder('gaze', 'demo', at)


def test_the_machine_makes_no_difference():
    plain = output_folder('gaze', 'demo', PARAMS)
    for name in set(MACHINE) - {'data_dir'}:
        assert output_folder('gaze', 'demo', PARAMS | {name: 'other'}) == plain


def test_order_of_parameters_makes_no_difference():
    turned = dict(reversed(PARAMS.items()))
    assert output_folder('gaze', 'demo', turned) == output_folder('gaze', 'demo', PARAMS)


def test_folders_lie_below_home_and_say_what_made_them():
    folder = output_folder('gaze', 'smoke', PARAMS | dict(preset='smoke'), data='abc')
    assert folder.parent == home() / 'reports' / 'gaze' and folder.name.startswith('smoke-')
    written = yaml.safe_load((folder / 'params.yaml').read_text())
    assert written == PARAMS | dict(preset='smoke', data='abc')


@pytest.mark.parametrize('name', ['../up', 'a/b', '', '.x', 'a' * 61, 'a b', 'a\n'])
def test_names_that_no_folder_can_have(name):
    for kw in (dict(notebook=name), dict(setting=name)):
        if kw == dict(setting=''):
            continue  # no setting
        with pytest.raises(ValueError, match='allowed: at most 60'):
            output_folder(**{'notebook': 'gaze', 'preset': 'demo', 'params': PARAMS} | kw)
    assert not (home() / 'up').exists()


@pytest.mark.parametrize('damage', ['a: [', '', '- 1', '\x00'])
def test_damaged_parameters_are_named(damage):
    folder = output_folder('gaze', 'demo', PARAMS, 'named')
    (folder / 'params.yaml').write_text(damage)
    with pytest.raises(ValueError, match='params.yaml'):
        output_folder('gaze', 'demo', PARAMS, 'named')


def test_a_table_is_written_as_numbers_that_pandas_reads(records, tmp_path, capsys):
    table = summary(records, 'top1', ('ERM', 'KD', 'teacher'), {'KD': {'top1': (80.0, 0.2)}})
    Page(tmp_path, 'demo').show(table, 'Top-1')
    back = pd.read_csv(tmp_path / 'top-1.csv')
    numbers = ['mean', 'std', 'n', 'paper', 'paper_std']
    pd.testing.assert_frame_equal(back[numbers], table[numbers], rtol=1e-14)
    assert not (tmp_path / 'top-1.csv').read_text().startswith('#')


def test_captions():
    assert caption('X', 'seeds 1 to 3', 'demo') == 'X. seeds 1 to 3.'
    assert caption('X', preset='smoke') == 'SMOKE - not a result. X.'
    made_by = [dict(commit='b', dirty=False), dict(commit='a', dirty=True)]
    line = provenance_line(dict(preset='demo', data_dir='', widths=[]), 'digits', made_by)
    assert line == 'preset demo · data: digits · commit a with local changes, b'


def test_a_picture_says_what_made_it(tmp_path):
    page = Page(tmp_path, 'smoke', 'seed 1', 'preset smoke · commit abc')
    page.show(figure(), 'Top-1 over λ')
    said = Image.open(tmp_path / 'top-1-over-lambda.png').info['Description']
    assert said == 'SMOKE - not a result. Top-1 over λ. seed 1. preset smoke · commit abc'


def displayed(monkeypatch):
    "What is handed to the notebook."
    import xcl.paper.show as show

    shown = []
    monkeypatch.setattr(show, 'display', lambda *objects: shown.extend(objects))
    return shown


def test_private_images_are_neither_stored_nor_left_in_the_results(monkeypatch, capsys):
    shown = displayed(monkeypatch)
    page = Page(output_folder('gaze', 'demo', PARAMS), 'demo')
    page.show(figure(), 'Eyes', private=True)
    assert shown == []
    assert [p.name for p in page.folder.iterdir()] == ['params.yaml']
    assert (home() / 'figures' / 'gaze' / page.folder.name / 'eyes.png').exists()
    printed = capsys.readouterr().out
    assert '$XCL_HOME/figures/gaze' in printed and str(home()) not in printed
    assert 'licen' not in printed  # the images may be the user's own


def test_images_of_ones_own_are_shown(monkeypatch):
    shown = displayed(monkeypatch)
    page = Page(output_folder('gaze', 'demo', PARAMS), 'demo', show_images=True)
    page.show(figure(), 'Eyes', private=True)
    assert len(shown) == 2 and (page.folder / 'eyes.png').exists()


def test_captions_are_escaped(monkeypatch, tmp_path):
    shown = displayed(monkeypatch)
    Page(tmp_path, 'demo').show(figure(), 'a < b & c')
    assert shown[1].data == '<p>a &lt; b &amp; c.</p>'


def test_figures_are_closed(tmp_path):
    before = plt.get_fignums()
    Page(tmp_path, 'demo').show(figure(), 'Top-1')
    assert plt.get_fignums() == before
