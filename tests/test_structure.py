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
NBS = sorted(o for o in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
NUMBERED = re.compile(r'\d\d[a-z]?_')
LIBRARY = [o for o in NBS if NUMBERED.match(o.name)]
EXPERIMENTS = [o for o in NBS if not NUMBERED.match(o.name)]
PY = sorted((ROOT / 'xcl').rglob('*.py'))
MODULES = [o for o in PY if o.name not in ('__init__.py', '_modidx.py')]
DIRECTIVE = re.compile(r'^\s*#\|\s*(\w+)', re.M)
MAX_CELL_LINES = 40


def rel(path):
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=rel)


@cache
def notebook(path):
    return json.loads(path.read_text(encoding='utf-8'))


def sources(path):
    return [''.join(o['source']) for o in notebook(path)['cells'] if o['cell_type'] == 'code']


def syntax(source):
    "The tree of a cell, IPython's own lines taken out."
    return ast.parse(
        '\n'.join(
            'pass' if o.lstrip().startswith(('%', '!')) else o
            for o in source.splitlines()
            if not o.startswith('%%')
        )
    )


@cache
def default_exp(path):
    "What a notebook says it exports to, as `models.gaze`; None if it does not say."
    found = [m for o in sources(path) for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', o, re.M)]
    assert len(found) < 2, f'{rel(path)} names {len(found)} modules: {found}'
    return found[0] if found else None


@cache
def order():
    return {default_exp(o): i for i, o in enumerate(LIBRARY) if default_exp(o)}


def module_name(path):
    return '.'.join(path.relative_to(ROOT / 'xcl').with_suffix('').parts)


def imported(path):
    "Modules of xcl that a module imports anywhere, lazily too: `models.gaze` for each of the ways to write it."
    package = ['xcl', *path.relative_to(ROOT / 'xcl').parent.parts]
    names = set()
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(o, ast.Import):
            names |= {a.name for a in o.names}
        if isinstance(o, ast.ImportFrom):
            base = package[: len(package) - o.level + 1] if o.level else []
            base = '.'.join([*base, *([o.module] if o.module else [])])
            names |= {base} | {f'{base}.{a.name}' for a in o.names}
    names = {o[len('xcl.') :] for o in names if o.startswith('xcl.')}
    return {o for o in names if (ROOT / 'xcl' / Path(*o.split('.'))).with_suffix('.py').exists()}


@each(LIBRARY)
def test_numbered_notebook_exports_the_module_of_its_name(path):
    module = default_exp(path)
    assert module, 'a numbered notebook needs a `#| default_exp` line'
    assert module.replace('.', '_') == NUMBERED.sub('', path.stem, count=1), (
        f'{rel(path)} exports {module}'
    )
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
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    assert ast.get_docstring(tree), (
        'no module docstring: the notebook needs a `# title` and a `> one line` below it'
    )
    defs = [
        o
        for o in tree.body
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not o.name.startswith('_')
    ]
    bare = [f'{o.name} (line {o.lineno})' for o in defs if not ast.get_docstring(o)]
    assert not bare, f'without a docstring: {", ".join(bare)}'


@each(NBS)
def test_code_cells_are_short(path):
    long = [
        f'{s.splitlines()[0][:60]!r} ({len(s.splitlines())} lines)'
        for s in sources(path)
        if len(s.splitlines()) > MAX_CELL_LINES
    ]
    assert not long, f'cells of more than {MAX_CELL_LINES} lines, which begin: {long}'


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


@each(EXPERIMENTS)
def test_experiment_only_uses_the_library(path):
    used = {m for o in sources(path) for m in DIRECTIVE.findall(o)}
    assert not used & {'export', 'exports', 'exporti', 'default_exp'}, (
        f'an experiment exports nothing, found {used}'
    )
    for source in sources(path):
        assert '.backward(' not in source, f'a training loop belongs in xcl.train:\n{source}'
        classes = [o.name for o in ast.walk(syntax(source)) if isinstance(o, ast.ClassDef)]
        assert not classes, f'classes belong in a numbered notebook: {classes}'


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


@each(texts())
def test_no_file_names_a_place_on_one_machine(path):
    found = re.findall(
        r'(?<![\w.])/(?:home|Users|root)/\w[^\s"\']*|[A-Z]:\\+Users\\+\w+',
        text := path.read_text(encoding='utf-8'),
    )
    if len(ROOT.parts) > 2:
        found += re.findall(rf'(?<![\w.]){re.escape(str(ROOT))}\b', text)
    assert not found, f'absolute paths: {sorted(set(found))[:5]}'


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


def test_readme_is_filled_in_and_its_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = [o for o in re.findall(r'\]\(([^)#\s]+)', text) if not o.startswith('http')]
    assert links and not [o for o in links if not (ROOT / o).exists()]
    assert not re.findall(r'@\w+@', text), 'a place that was to be filled in'
