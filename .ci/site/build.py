"""All notebooks as pages with an index and a search: python .ci/site/build.py [FOLDER]

The pages are made from what git tracks, in a copy. An experiment is shown as it was executed for
outputs/<notebook>/demo; a link that leads nowhere stops the build."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGES = 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'


def tracked():
    "Paths that git tracks, relative to the checkout."
    folders = 'nbs', 'outputs', 'tests', 'benchmarks', 'xcl', '.ci'
    files = 'LICENSE', 'CITATION.cff', 'Makefile', 'settings.ini'
    words = ['git', 'ls-files', '-z', *folders, *PAGES, *files]
    out = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in out.split('\0') if name]


def executed(notebook):
    "The executed form of an experiment, or the notebook itself where there is none."
    published = ROOT / 'outputs' / notebook.stem / 'demo' / 'notebook.ipynb'
    return published if published.exists() else ROOT / notebook


def names(source, pattern):
    "Pages below the source, as a toctree names them."
    paths = sorted(source.glob(pattern))
    return '\n'.join(path.relative_to(source).with_suffix('').as_posix() for path in paths)


def toctree(caption, pages):
    return f'```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n\n{pages}\n```\n'


def write_source(source):
    "Copy the tracked files, with executed experiments, and write the index."
    shutil.rmtree(source, ignore_errors=True)
    for path in tracked():
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        experiment = path.suffix == '.ipynb' and path.parent == Path('nbs')
        shutil.copy(executed(path) if experiment else ROOT / path, target)
    for path in (source / 'outputs').rglob('*.ipynb'):
        path.unlink()  # shown in the place of their notebooks
    parts = [
        toctree('Experiments', names(source, 'nbs/*.ipynb')),
        toctree('The library', names(source, 'nbs/lib/*.ipynb')),
        toctree('The paper', names(source, 'nbs/lib/paper/*.ipynb')),
        toctree('More', 'nbs/apps/explore\nCONTRIBUTING\nCHANGELOG\noutputs/README'),
    ]
    readme = (source / 'README.md').read_text(encoding='utf-8')
    (source / 'README.md').unlink()
    (source / 'index.md').write_text(f'{readme}\n\n{"".join(parts)}', encoding='utf-8')
    shutil.copy(HERE / 'conf.py', source)


def redirected(source):
    "Links to executed notebooks lead to the page that shows them, those to README to the index."
    executed = re.compile(r'(\]\((?:\.\./)*)outputs/(\w+)/[^)\s]*\.ipynb')
    readme = re.compile(r'(\]\((?:\.\./)*)README\.md')
    for path in [*source.rglob('*.md'), *source.rglob('*.ipynb')]:
        text = path.read_text(encoding='utf-8')
        text = readme.sub(r'\1index.md', executed.sub(r'\1nbs/\2.ipynb', text))
        if path.parent.name == 'outputs':
            text = re.sub(r'\]\((\w+)/[^)\s]*\.ipynb', r'](../nbs/\1.ipynb', text)
        path.write_text(text, encoding='utf-8')


def main(folder):
    source, site = folder / 'source', folder / 'html'
    write_source(source)
    redirected(source)
    words = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-j', '2', '-b', 'html']
    code = subprocess.run([*words, str(source), str(site)]).returncode
    if code == 0:
        print(f'{len(list(site.rglob("*.html")))} pages: open {site / "index.html"}')
    return code


if __name__ == '__main__':
    given = sys.argv[1:]
    sys.exit(main(Path(given[0]) if given else ROOT / 'outputs' / 'runs' / 'site'))
