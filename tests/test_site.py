"""The pages of `make site`: built strictly, with every notebook, an index and a search, without a host."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADED = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["'](https?:)?//""")


@pytest.mark.slow
def test_the_site(tmp_path):
    if not all(map(find_spec, ('sphinx', 'myst_nb', 'furo'))):
        pytest.skip('sphinx, myst-nb or furo is not installed; they are the extra `site`')
    words = [sys.executable, '.ci/site/build.py', str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    site = tmp_path / 'html'
    found = {path.relative_to(site).with_suffix('') for path in site.rglob('*.html')}
    wanted = {path.relative_to(ROOT).with_suffix('') for path in (ROOT / 'nbs').rglob('*.ipynb')}
    assert wanted <= found and Path('index') in found and Path('search') in found
    assert 'mixup' in (site / 'searchindex.js').read_text(encoding='utf-8').lower()
    pages = [site / 'index.html', site / 'nbs' / 'lib' / '36_transfer.html']
    assert not [page.name for page in pages if LOADED.search(page.read_text(encoding='utf-8'))]
