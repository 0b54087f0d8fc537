"Sections: everything that can be refused is, before anything trains; then runs, numbers and words."

import ast
import json
import shutil
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from xcl.config import Config
from xcl.files import home
from xcl.images import image_data
from xcl.likelihoods import Categorical
from xcl.nets import net
from xcl.objective import Both
from xcl.paper import checks
from xcl.paper.cifar import CifarSection, ResNet18Params
from xcl.paper.params import ParameterError, SectionParams
from xcl.paper.row import Row
from xcl.paper.rows import CIFAR
from xcl.paper.section import Section
from xcl.paper.show import file_name
from xcl.paper.smoothing import SmoothingParams, SmoothingSection
from xcl.paper.student_size import StudentSizeParams, StudentSizeSection
from xcl.paper.teacher_kinds import TeachersParams, TeachersSection
from xcl.paper.temperature import TemperatureParams, TemperatureSection
from xcl.transfer import CutMix, Empirical, MixUp, RandomChoice

NBS = Path(__file__).resolve().parent.parent / 'nbs'
SMALL = dict(preset='smoke', device='cpu', width=4)


def small(rows='ERM, KD, XCL-Mix', name='resnet18', **changes):
    "A section on 128 digits, a few seconds long."
    return CifarSection(name, ResNet18Params.of(rows=rows, **{**SMALL, **changes}))


def trained():
    "Folders of runs."
    return list(home().rglob('config.json'))


# ---- what is refused ----


def refused(exp, error, message):
    "It stops with a message, in check() and in run(), and nothing was trained."
    for start in (exp.check, exp.run):
        with pytest.raises(error, match=message):
            start()
    assert not trained()


def test_data_that_is_not_there(tmp_path):
    nowhere = str(tmp_path / 'nowhere')
    exp = small(dataset='cifar100', data_dir=nowhere, train_size=0)
    refused(exp, FileNotFoundError, 'nowhere')


def test_data_of_another_kind(tmp_path):
    (tmp_path / 'notes.txt').write_text('no images here')
    exp = small(dataset='folder', data_dir=str(tmp_path), train_size=0)
    refused(exp, FileNotFoundError, 'holds notes.txt; expected .*train')


def test_a_training_set_without_a_batch():
    refused(small(train_size=100), ParameterError, '100 training examples make no batch of 128')


def test_more_images_than_there_are():
    refused(small(train_size=5000), ValueError, '5000|5,000')


def test_a_setting_that_cannot_name_a_folder():
    refused(small(setting='a/b'), ValueError, "setting is 'a/b'; allowed")


def test_results_of_other_parameters_are_kept():
    "Two settings of one name with other parameters: the second is refused, whatever the difference."
    small(setting='mine').check()
    for change in (
        dict(width=8),
        dict(seed=2),
        dict(rows='KD'),
        dict(budget=0.01),
        dict(store='half'),
    ):
        refused(small(setting='mine', **change), FileExistsError, f'{next(iter(change))}: ')
    small(setting='mine', show_images=True).check()  # is no part of the results


def test_a_disk_without_room(monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**6, 10**6 - 1000, 1000))
    refused(small(store='half'), OSError, "soft targets need .* GB.*store = 'off'")
    small().check()  # needs none


def test_room_is_needed_once_for_all_temperatures():
    rows = 'KD, KD T=2, KD T=5'
    exp = small(rows, store='half', seeds=1)
    students = [c for (c, *_) in exp.grid.values()]
    one = checks.needed_bytes(students[1:2], exp.runtime)
    assert one > 0 and checks.needed_bytes(students, exp.runtime) == one


def test_a_row_without_its_generator():
    refused(CifarSection('gan', small().P, [Row('XCL-GAN')]), ValueError, 'no transfer set')


def test_two_rows_of_one_name():
    with pytest.raises(ValueError, match='several rows: ERM'):
        CifarSection('resnet18', small().P, [CIFAR['ERM'], CIFAR['ERM']])


def test_a_section_says_what_it_lacks():
    class Empty(Section):
        "Nothing is given."

    exp = Empty('empty', SectionParams.of(preset='smoke', device='cpu'), CIFAR.pick('ERM'))
    for name in ('data', 'network'):
        with pytest.raises(NotImplementedError, match=f'Empty.{name}'):
            getattr(exp, name)(1)
    with pytest.raises(NotImplementedError, match='Empty.description'):
        print(exp.description)


def test_a_recipe_that_a_row_breaks():
    broken = replace(CIFAR['ERM'], recipe=(('weight_decay', -1.0),))
    refused(CifarSection('resnet18', small().P, [broken]), ValueError, 'weight_decay is -1')


# ---- what is trained ----


def test_the_grid():
    exp = small(rows='ERM, KD, KD T=5, XCL-Mix', members=3)
    assert list(exp.grid)[:2] == [('teacher', 1), ('ERM', 1)]
    assert len(exp.grid) == 1 + 4 * 2
    assert [c.seed for c in exp.grid['teacher', 1]] == [1001, 1002, 1003]
    cold, warm = exp.grid['KD', 2][0], exp.grid['KD T=5', 2][0]
    assert replace(warm, likelihood=cold.likelihood) == cold
    assert cold.teachers == exp.grid['teacher', 1] and not exp.grid['ERM', 2][0].teachers


def test_without_a_student_of_the_teacher_none_is_trained():
    exp = CifarSection('resnet18', small().P, CIFAR.pick('ERM, MixUp'))
    assert {row for row, _ in exp.grid} == {'ERM', 'MixUp'} and exp.names == ['ERM', 'MixUp']


def test_one_teacher_for_each_seed():
    class Own(CifarSection):
        "Each seed has a teacher."

        shared_teacher = False

    grid = Own('own', small().P).grid
    assert [c.seed for c in grid['teacher', 2]] == [2001, 2002]
    assert grid['KD', 2][0].teachers == grid['teacher', 2]


def test_store_and_precision_are_those_of_runs_with_a_teacher():
    "A student of labels is the same run with and without a store."
    plain, half = small().grid, small(store='half', precision='bf16').grid
    assert half['KD', 1][0].targets == 'half' and half['KD', 1][0].teacher_precision == 'bf16'
    assert plain['KD', 1][0].targets == 'exact'
    assert small(store='half').grid['ERM', 1] == plain['ERM', 1]
    assert small(store='full').grid['KD', 1] == plain['KD', 1], 'a full store changes no number'


def test_budgets_of_teachers():
    exp = small(budget=0.01, teacher_budget=0.5)
    assert (
        exp.grid['teacher', 1][0].recipe.epochs == 200 and exp.grid['KD', 1][0].recipe.epochs == 4
    )


def test_rows_of_ones_own():
    "A method costs one line: another transfer set, another objective."
    funmatch = Row('FunMatch', MixUp(per_sample=True))
    hinton = Row('Hinton', Empirical(), Both(0.1, 0.9), T=4.0)
    exp = CifarSection('own', small(seeds=1).P, [*CIFAR.pick('ERM, KD'), funmatch, hinton]).run()
    assert set(exp.records.row) == {'ERM', 'KD', 'FunMatch', 'Hinton', 'teacher'}
    assert exp.runs['Hinton', 1][0].cfg.method.objective == Both(0.1, 0.9)
    assert list(exp.colours) == ['ERM', 'KD', 'FunMatch', 'Hinton', 'teacher']


class Linear(nn.Module):
    "A network that was trained elsewhere."

    def __init__(self, n_out=10):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, n_out)

    def forward(self, x):
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Fixed(Config):
    "A teacher that is no run, with fixed weights."

    slug = 'fixed'
    n_out = 10

    def network(self, runtime):
        torch.manual_seed(0)
        return Linear().eval()


def test_a_teacher_from_elsewhere():
    "Its members are not trained here; it is scored by its predictions."

    class Taught(CifarSection):
        "The teacher is given."

        def teachers(self, seed, name='teacher'):
            return (Fixed(),)

    exp = Taught('given', small(seeds=1).P, CIFAR.pick('ERM, KD')).run()
    assert ('teacher', 1) not in exp.runs
    val = exp.sets[1]
    with torch.no_grad():
        right = Fixed().network(None)(val.x / 255).argmax(1) == val.y
    score = exp.records[(exp.records.row == 'teacher') & (exp.records.metric == 'top1')].value
    assert score.tolist() == pytest.approx([100 * right.double().mean().item()])


# ---- a finished section ----


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "ERM, KD and XCL-Mix on two seeds."
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('XCL_HOME', str(tmp_path_factory.mktemp('finished')))
        yield small().run()


def test_records_are_tidy(finished):
    frame = finished.records
    assert list(frame.columns) == ['section', 'row', 'seed', 'metric', 'value']
    assert not frame.duplicated(['row', 'seed', 'metric']).any()
    counts = frame[frame.metric == 'top1'].groupby('row').size()
    assert counts.to_dict() == {'ERM': 2, 'KD': 2, 'XCL-Mix': 2, 'teacher': 1}
    assert 'entropy' not in set(frame[frame.row == 'teacher'].metric)


def test_scores_are_those_of_the_runs(finished):
    for (row, seed), (run, *_) in finished.runs.items():
        if row == 'teacher':
            continue
        of = finished.records[(finished.records.row == row) & (finished.records.seed == seed)]
        values = of.set_index('metric').value
        assert values.top1 == run.result['top1']
        assert values.entropy == 100 * run.result['target_entropy']


def test_the_teacher_is_scored_as_one(finished):
    logits = torch.stack([o['out'] for o in finished.predictions('teacher')])
    y = finished.predictions('teacher')[0]['y']
    right = logits.double().softmax(-1).mean(0).argmax(1) == y
    frame = finished.records
    score = frame[(frame.row == 'teacher') & (frame.metric == 'top1')].value.item()
    assert score == pytest.approx(100 * right.double().mean().item())
    p = finished.ensemble()(finished.sets[1].x[:100] / 255)
    want = logits[:, :100].softmax(-1).mean(0)
    torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)


def test_the_table_is_numbers(finished):
    table = finished.table()
    assert {'row', 'metric', 'mean', 'std', 'n', 'paper'} <= set(table.columns)
    kd = table[(table.row == 'KD') & (table.metric == 'top1')].iloc[0]
    assert kd.n == 2 and kd.paper == 80.0
    assert pd.api.types.is_numeric_dtype(table['mean'])


def test_the_summary_is_written_from_the_numbers(finished):
    seen, effects, gap = finished.summary()
    assert seen.startswith('SMOKE - not a result. Top-1 (%, means over 2 seeds): ')
    frame = finished.records[finished.records.metric == 'top1']
    means = frame.groupby('row').value.mean()
    assert f'KD {means["KD"]:.2f}' in seen
    assert f'XCL-Mix minus KD: {means["XCL-Mix"] - means["KD"]:+.2f} points [' in effects
    assert 'gap to' in gap
    assert finished.summary()._repr_markdown_().count('\n- ') == 2


def test_results_lie_in_one_folder(finished, capsys):
    finished.show(finished.table(), 'Top-1 accuracy')
    assert (finished.folder / 'top-1-accuracy.csv').exists()
    names = {p.name for p in finished.folder.iterdir()}
    assert {'params.yaml', 'records.json'} <= names
    stored = json.loads((finished.folder / 'records.json').read_text())
    assert len(stored['runs']) == 3 * 2 + 2
    finished.about()
    said = capsys.readouterr().out
    assert 'seeds 1 to 2' in said and 'width 4' in said and 'commit' in said


def test_found_again(finished, monkeypatch):
    "The same section finds its runs, wherever the notebook is executed."
    monkeypatch.setenv('XCL_HOME', str(finished.folder.parents[2]))
    times = {p: p.stat().st_mtime_ns for p in home().glob('*/result.json')}
    again = small().run()
    assert {p: p.stat().st_mtime_ns for p in home().glob('*/result.json')} == times
    pd.testing.assert_frame_equal(again.records, finished.records)
    table = again.runs_table()
    pd.testing.assert_frame_equal(again.run().runs_table(), table)  # the same object, twice


def test_runs_made_at_the_same_time_are_those_of_one_process(finished):
    "With as many threads each, to the bit; and their processes leave nothing behind."
    threads = torch.get_num_threads()
    torch.set_num_threads(2 * threads)  # two processes share them
    both = small('ERM, KD', seeds=1, parallel=2)
    both.run()
    torch.set_num_threads(threads)
    for key in ('ERM', 1), ('KD', 1), ('teacher', 1):
        mine, theirs = both.runs[key], finished.runs[key]
        assert [r.result for r in mine] == [r.result for r in theirs]
        assert {r.provenance['threads'] for r in mine} == {threads}
    assert sorted(p.name for p in home().iterdir() if p.is_dir()) == sorted(
        [*{r.folder.name for runs in both.runs.values() for r in runs}, 'cache', 'reports']
    )


def test_a_run_that_fails_in_its_process_is_named(monkeypatch):
    exp = small('ERM, KD', seeds=1, parallel=2)
    monkeypatch.setattr('xcl.paper.section.make_all', lambda *a, **kw: {1: 'OSError: disk full'})
    with pytest.raises(RuntimeError, match='seed1002: OSError: disk full'):
        exp.run()


def test_code_that_no_process_can_import_is_refused(monkeypatch):
    def refuse(configs):
        raise ValueError('Own is defined in a notebook')

    monkeypatch.setattr('xcl.paper.section.own_modules', refuse)
    with pytest.raises(ValueError, match='in a notebook; or give parallel = 1'):
        small('ERM, KD', seeds=1, parallel=2).run()
    assert not trained()


def test_pictures_of_a_data_set_are_private():
    own = CifarSection('own', replace(small().P, dataset='folder', data_dir='there'))
    assert own.private and not own.photos and not small().private
    shown = CifarSection('own', replace(own.P, show_images=True))
    assert shown.photos


# ---- other sections ----


def test_students_of_table_2_differ_in_their_teachers_alone():
    exp = TeachersSection('teachers', TeachersParams.of(preset='smoke', device='cpu', seeds=1))
    students = [exp.grid[kind, 1][0] for kind in exp.names]
    assert all(replace(s, teachers=students[0].teachers) == students[0] for s in students)
    members = {kind: exp.grid[f'teacher {kind}', 1][0] for kind in exp.names}
    assert members['+ LS 0.1'].likelihood == Categorical(10, eps=0.1)
    assert members['+ CutMix'].method.transfer == RandomChoice(CutMix(), Empirical())
    assert members['PyramidNet + CutMix'].net == net('pyramidnet', depth=11, alpha=16.0)
    assert members['ResNet-18'].method.transfer == Empirical()
    resnet18 = CifarSection('resnet18', ResNet18Params.of(preset='smoke', device='cpu'))
    assert exp.grid['teacher + CutMix', 1] == resnet18.grid['teacher', 1], 'notebooks share runs'


def test_rows_of_tables_3_to_5():
    smooth = SmoothingSection('label_smoothing', SmoothingParams.of(smoothing='0.4, 0.1', **SMALL))
    assert smooth.rows.names == ['ERM', 'LS 0.4', 'LS 0.1', 'XCL-Mix']
    warm = TemperatureSection('temperature', TemperatureParams.of(temperatures='5 1', **SMALL))
    assert warm.rows.names == ['KD', 'KD T=5', 'XCL-Mix', 'XCL-Mix T=5']
    assert {c.targets for (c, *_) in warm.grid.values() if c.teachers} == {'half'}
    tempered = TemperatureParams.of(temper='mean', scale_t2=False, **SMALL)
    student = TemperatureSection('temperature', tempered).grid['KD T=5', 1][0]
    assert student.likelihood == Categorical(10, 5.0, 'mean')


def test_rows_of_figure_1():
    P = StudentSizeParams.of(single_seed='binary 8', shortcuts='binary', **SMALL)
    exp = StudentSizeSection('student_size', P)
    assert exp.rows.names[0] == 'ERM, full 4' and len(exp.rows) == 3 * 4
    assert ('KD, binary 8', 1) in exp.grid and ('KD, binary 8', 2) not in exp.grid
    binary = exp.grid['KD, binary 8', 1][0]
    assert binary.net == net('binary_resnet18', width=8, binary_shortcut=True)
    assert binary.recipe.optimiser == 'adam'
    assert {c.teachers for (c, *_) in exp.grid.values() if c.teachers} == {exp.grid['teacher', 1]}


def test_image_data_of_all_sections_is_one():
    exp = small()
    assert exp.data(1) == exp.data(2) == image_data('digits', train_size=128, test_size=100)


# ---- notebooks ----


def shown_titles(path):
    "Titles of `exp.show(..., 'title')` in a notebook; those that are computed are left out."
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    calls = [
        n
        for c in cells
        for n in ast.walk(ast.parse(''.join(c['source'])))
        if isinstance(n, ast.Call)
    ]
    shows = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr == 'show']
    titles = [n.args[1] for n in shows if len(n.args) > 1]
    return [t.value for t in titles if isinstance(t, ast.Constant)]


SECTIONS = [
    'resnet18',
    'pyramidnet',
    'binarynet',
    'teachers',
    'student_size',
    'label_smoothing',
    'temperature',
]


@pytest.mark.parametrize('name', SECTIONS)
def test_titles_name_different_files(name):
    titles = shown_titles(NBS / f'{name}.ipynb')
    assert len(titles) >= 3
    names = [file_name(t) for t in titles]
    assert len(set(names)) == len(names), sorted(names)
    assert max(map(len, titles)) <= 75, 'titles are short'


@pytest.mark.parametrize('name', SECTIONS)
def test_a_notebook_has_at_most_sixty_lines_of_code(name):
    cells = json.loads((NBS / f'{name}.ipynb').read_text())['cells']
    lines = [
        line for c in cells if c['cell_type'] == 'code' for line in ''.join(c['source']).split('\n')
    ]
    written = [line for line in lines if line.strip()]
    assert len(written) <= 60
    assert max(map(len, written)) <= 100
    last = ''.join(cells[-1]['source'])
    assert last.startswith('## Differences from the paper')
    assert sum('exp.summary()' in line for line in written) == 2
