"The house rules that a program can check. Each test is named by the file that it is about."

import ast
import json
import re
import subprocess
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = re.compile(r'\d\d[a-z]?_')
MAX_CELL_LINES = 60  # of any cell
MAX_MODULE_LINES = 400  # of an exported module
MAX_COLUMNS = dict(library=110, experiment=100)
MAX_EXPERIMENT_LINES = 60  # of code, blank lines left out
MAX_SCRATCH_LINES = 80  # of nbs/from_scratch.ipynb, which does without the library
MAX_COMPREHENSIONS = 2  # in one statement


def notebooks(folder):
    "Notebooks directly in a folder, sorted by name."
    return sorted(folder.glob('*.ipynb'))


# the order of imports: the engine before the paper wing
LIBRARY = [*notebooks(ROOT / 'nbs' / 'lib'), *notebooks(ROOT / 'nbs' / 'lib' / 'paper')]
EXPERIMENTS = notebooks(ROOT / 'nbs')
NBS = LIBRARY + EXPERIMENTS
PY = sorted((ROOT / 'xcl').rglob('*.py'))
MODULES = [o for o in PY if o.name not in ('__init__.py', '_modidx.py')]
DIRECTIVE = re.compile(r'^\s*#\|\s*(\w+)', re.M)
COMPREHENSION = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def rel(path):
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=rel)


@cache
def notebook(path):
    return json.loads(path.read_text(encoding='utf-8'))


def sources(path):
    return [''.join(o['source']) for o in notebook(path)['cells'] if o['cell_type'] == 'code']


def plain_python(source):
    "A cell without IPython's own lines."
    lines = source.splitlines()
    magic = ('%', '!')
    return '\n'.join('pass' if o.lstrip().startswith(magic) else o for o in lines if o[:2] != '%%')


def syntax(source):
    "The syntax tree of a cell."
    return ast.parse(plain_python(source))


@cache
def tree(path):
    "The syntax tree of a module."
    return ast.parse(path.read_text(encoding='utf-8'))


@cache
def default_exp(path):
    "The module that a notebook exports to, as `models.gaze`; None where it exports to none."
    found = [m for o in sources(path) for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', o, re.M)]
    assert len(found) < 2, f'{rel(path)} names {len(found)} modules: {found}'
    return found[0] if found else None


@cache
def order():
    "Module -> position of its notebook."
    return {default_exp(o): i for i, o in enumerate(LIBRARY) if default_exp(o)}


def module_name(path):
    return '.'.join(path.relative_to(ROOT / 'xcl').with_suffix('').parts)


def import_froms(path):
    "(module of xcl, name) of each name that a module imports from the package, lazily too."
    package = ['xcl', *path.relative_to(ROOT / 'xcl').parent.parts]
    for o in ast.walk(tree(path)):
        if not isinstance(o, ast.ImportFrom):
            continue
        base = package[: len(package) - o.level + 1] if o.level else []
        module = '.'.join([*base, *([o.module] if o.module else [])])
        for alias in o.names:
            if module == 'xcl' or module.startswith('xcl.'):
                yield module, alias.name


def imported(path):
    "Modules of xcl that a module imports, as `models.gaze`."
    names = {a.name for o in ast.walk(tree(path)) if isinstance(o, ast.Import) for a in o.names}
    for module, name in import_froms(path):
        names |= {module, f'{module}.{name}'}
    names = {o.removeprefix('xcl.') for o in names if o.startswith('xcl.')}
    return {o for o in names if (ROOT / 'xcl' / Path(*o.split('.'))).with_suffix('.py').exists()}


@each(LIBRARY)
def test_numbered_notebook_exports_the_module_of_its_name(path):
    module = default_exp(path)
    assert NUMBERED.match(path.name), 'notebooks of the library begin with their number'
    assert module, 'a numbered notebook needs a `#| default_exp` line'
    local = module.removeprefix('paper.') if path.parent.name == 'paper' else module
    assert local.replace('.', '_') == NUMBERED.sub('', path.stem, count=1), (
        f'{rel(path)} exports {module}'
    )
    assert module.startswith('paper.') == (path.parent.name == 'paper')
    assert (ROOT / 'xcl' / Path(*module.split('.'))).with_suffix('.py').exists(), (
        f'{module} is not exported: run `make export`'
    )


def test_no_module_has_two_notebooks():
    modules = [default_exp(o) for o in LIBRARY]
    assert len(modules) == len(set(modules)), modules


@each(MODULES)
def test_module_has_a_notebook_and_imports_only_earlier_ones(path):
    name = module_name(path)
    assert name in order(), 'an orphan: no numbered notebook exports it'
    unknown = imported(path) - set(order())
    assert not unknown, f'imports modules without a notebook: {unknown}'
    later = {o for o in imported(path) if order()[o] >= order()[name]}
    assert not later, f'{name} imports {later}, which come later (this also rules out cycles)'


@each(MODULES)
def test_the_engine_never_imports_the_paper(path):
    if module_name(path).startswith('paper.'):
        return
    paper = {o for o in imported(path) if o.startswith('paper')}
    assert not paper, f'{module_name(path)} belongs to the engine, and imports {paper}'


@each(MODULES)
def test_no_private_name_of_another_module_is_imported(path):
    private = [
        f'{m}.{n}' for m, n in import_froms(path) if n.startswith('_') and n != '__version__'
    ]
    assert not private, private


@each(MODULES)
def test_public_names_have_docstrings(path):
    assert ast.get_docstring(tree(path)), (
        'no module docstring: the notebook needs a `# title` and a `> one line` below it'
    )
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    defs = [o for o in tree(path).body if isinstance(o, kinds) and not o.name.startswith('_')]
    bare = [f'{o.name} (line {o.lineno})' for o in defs if not ast.get_docstring(o)]
    assert not bare, f'without a docstring: {", ".join(bare)}'


@each(MODULES)
def test_module_is_short(path):
    lines = len(path.read_text(encoding='utf-8').splitlines())
    assert lines < MAX_MODULE_LINES, f'{lines} lines; split the notebook'


@each(MODULES)
def test_no_function_takes_an_untyped_bag(path):
    assert 'SimpleNamespace' not in path.read_text(encoding='utf-8'), 'give the bag a type'


def dense(source):
    "Statements with more comprehensions than one can read."
    for o in ast.walk(source):
        if not isinstance(o, ast.stmt) or hasattr(o, 'body'):
            continue
        count = sum(isinstance(n, COMPREHENSION) for n in ast.walk(o))
        if count > MAX_COMPREHENSIONS:
            yield f'line {o.lineno}: {count} comprehensions'


@each(MODULES)
def test_statements_hold_one_thought(path):
    found = list(dense(tree(path)))
    for o in ast.walk(tree(path)):
        body = getattr(o, 'body', None)
        if isinstance(body, list):
            found += [
                f'line {b.lineno}: a second statement'
                for a, b in zip(body, body[1:])
                if a.end_lineno == b.lineno
            ]
    assert not found, found


@each(NBS)
def test_lines_are_short(path):
    limit = MAX_COLUMNS['library' if path in LIBRARY else 'experiment']
    long = [o for s in sources(path) for o in s.splitlines() if len(o) > limit]
    assert not long, f'{len(long)} lines over {limit} columns, e.g. {long[0]!r}'


@each(NBS)
def test_code_cells_are_short(path):
    cells = [s.splitlines() for s in sources(path)]
    long = [f'{c[0][:60]!r} ({len(c)} lines)' for c in cells if len(c) > MAX_CELL_LINES]
    assert not long, f'cells of more than {MAX_CELL_LINES} lines, which begin: {long}'


@each(EXPERIMENTS)
def test_experiment_is_short(path):
    lines = [o for s in sources(path) for o in s.splitlines() if o.strip()]
    most = MAX_SCRATCH_LINES if path.stem == 'from_scratch' else MAX_EXPERIMENT_LINES
    assert len(lines) <= most, f'{len(lines)} lines of code'


@each(NBS)
def test_notebook_names_its_kernel(path):
    spec = notebook(path)['metadata'].get('kernelspec', {})
    assert (spec.get('name'), spec.get('language')) == ('python3', 'python'), (
        f'papermill needs both, found {spec}'
    )


@each(NBS)
def test_notebook_opens_with_a_title(path):
    first = notebook(path)['cells'][0]
    assert first['cell_type'] == 'markdown' and ''.join(first['source']).startswith('# '), (
        'the first cell is not `# title`'
    )


def parameter_cells(path):
    return [o for o in notebook(path)['cells'] if 'parameters' in o['metadata'].get('tags', [])]


@each(LIBRARY)
def test_library_notebook_has_no_parameters_cell(path):
    assert not parameter_cells(path)


@each(EXPERIMENTS)
def test_experiment_has_one_parameters_cell_of_annotated_literals(path):
    cells = parameter_cells(path)
    assert len(cells) == 1 and cells[0]['cell_type'] == 'code', (
        f'{len(cells)} cells are tagged `parameters`'
    )
    source = ''.join(cells[0]['source'])
    lines = source.splitlines()
    body = syntax(source).body
    assert body, 'the parameters cell is empty'
    for o in body:
        line = lines[o.lineno - 1]
        assert isinstance(o, ast.AnnAssign) and o.value is not None, (
            f'not an annotated assignment: {line}'
        )
        try:
            ast.literal_eval(o.value)
        except ValueError:
            pytest.fail(f'not a literal: {line}')
        assert '#' in lines[o.end_lineno - 1][o.end_col_offset :], f'no comment: {line}'


@each([p for p in EXPERIMENTS if p.stem != 'from_scratch'])
def test_experiment_only_uses_the_library(path):
    used = {m for o in sources(path) for m in DIRECTIVE.findall(o)}
    assert not used & {'export', 'exports', 'exporti', 'default_exp'}, (
        f'an experiment exports nothing, found {used}'
    )
    for source in sources(path):
        assert '.backward(' not in source, f'a training loop belongs in xcl.train:\n{source}'
        classes = [o.name for o in ast.walk(syntax(source)) if isinstance(o, ast.ClassDef)]
        assert not classes, f'classes belong in a numbered notebook: {classes}'


@each(EXPERIMENTS)
def test_experiment_draws_no_conclusion_ahead_of_its_numbers(path):
    "What was seen is written from the run's numbers (`summary`, nbs/results.ipynb), not as 'if ... then'."
    text, judged = _prose(path), 'supported|contradicted|helps'
    lines = [o for o in text.splitlines() if re.match(r'(- |\d+\. )?(If|Unless) ', o)]
    lines += re.findall(rf'[^.]*\b(?:{judged})(?: here)? if\b[^.]*', text)
    assert not lines, lines


def texts():
    "Every text file of the project, uncommitted ones too; what git ignores is left out."
    try:
        out = subprocess.run(
            ['git', 'ls-files', '-coz', '--exclude-standard'],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        paths = [ROOT / o for o in out.decode().split('\0') if o]
    except (OSError, subprocess.CalledProcessError):  # an archive without git
        paths = [
            *ROOT.glob('*'),
            *(
                p
                for d in ('nbs', 'xcl', 'tests', 'benchmarks', 'outputs')
                for p in (ROOT / d).rglob('*')
            ),
        ]
    kinds = {
        '.py',
        '.ipynb',
        '.md',
        '.ini',
        '.toml',
        '.cff',
        '.json',
        '.csv',
        '.yml',
        '.yaml',
        '.txt',
        '.sh',
        '',
    }
    return sorted(
        {
            o
            for o in paths
            if o.is_file()
            and o.suffix in kinds
            and not {'.git', '__pycache__', 'runs'} & set(o.relative_to(ROOT).parts)
        }
    )


def test_no_file_names_a_place_on_one_machine():
    place = re.compile(r'(?<![\w.])/(?:home|Users|root)/\w[^\s"\']*|[A-Z]:\\+Users\\+\w+')
    here = re.compile(rf'(?<![\w.]){re.escape(str(ROOT))}\b')
    found = {}
    for path in texts():
        text = path.read_text(encoding='utf-8')
        places = place.findall(text) + (here.findall(text) if len(ROOT.parts) > 2 else [])
        if places:
            found[rel(path)] = sorted(set(places))[:5]
    assert not found, 'absolute paths'


@pytest.fixture(scope='module')
def settings():
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


@pytest.mark.parametrize(
    'key, value, why',
    [
        (
            'allowed_cell_metadata_keys',
            'tags',
            'else cleaning deletes the `parameters` tag and papermill overrides nothing, silently',
        ),
        (
            'update_pyproject',
            'False',
            'else a pyproject.toml appears that breaks `pip install -e .`',
        ),
        ('tst_flags', 'slow cuda', 'else nbdev_test runs the cells with these flags'),
        ('jupyter_hooks', 'True', 'else a notebook is saved unclean'),
        ('readme_nb', 'none', 'README.md is written by hand'),
        ('clear_all', 'False', 'else cleaning deletes the figures'),
        ('recursive', 'True', 'else notebooks in folders are not exported'),
        ('nbs_path', 'nbs', 'the notebooks are in nbs'),
        ('lib_path', 'xcl', 'the package is in xcl'),
    ],
)
def test_settings_hold(settings, key, value, why):
    assert settings.get(key) == value, why


@pytest.mark.parametrize('key', ['user', 'branch', 'author', 'version', 'license', 'min_python'])
def test_settings_are_filled_in(settings, key):
    assert settings.get(key, '').strip(), 'nbdev_prepare crashes without it'


@pytest.mark.parametrize('pin', ['nbdev==2.4.14', 'execnb<0.2', 'fastcore<2'])
def test_settings_pin_nbdev(settings, pin):
    assert pin in settings['requirements'].split(), 'nbdev 2 does not import with later ones'


def test_requirements_have_no_spaces_inside(settings):
    bad = [
        o
        for k in ('requirements', 'dev_requirements')
        for o in settings[k].split()
        if not re.match(r'[A-Za-z]', o)
    ]
    assert not bad, f'setup.py splits at spaces, which leaves {bad} on their own'


def test_no_pyproject():
    assert not (ROOT / 'pyproject.toml').exists(), 'settings.ini is where the project is described'


def test_version_is_written_once(settings):
    assert f'__version__ = "{settings["version"]}"' in (ROOT / 'xcl/__init__.py').read_text(
        encoding='utf-8'
    )


def _prose(path):
    "Text of a Markdown file, or of the Markdown cells of a notebook."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb':
        return text
    cells = json.loads(text)['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def test_links_lead_somewhere():
    "In pages, and in executed notebooks, whose links are those of the notebook in nbs."
    pages = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'outputs' / 'README.md']
    beside = {p: p.parent for p in (*pages, *(ROOT / 'nbs').rglob('*.ipynb'))}
    beside |= dict.fromkeys((ROOT / 'outputs').glob('*/*/notebook.ipynb'), ROOT / 'nbs')
    links = {
        (p, at / o)
        for p, at in beside.items()
        for o in re.findall(r'\]\(([^)#\s]+)', _prose(p))
        if '//' not in o
    }
    assert len(links) > 100
    assert not sorted(f'{p.relative_to(ROOT)}: {o}' for p, o in links if not o.exists())


def test_readme_is_filled_in():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert not re.findall(r'@\w+@', text), 'a place that was to be filled in'
