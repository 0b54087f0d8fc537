"""The explorer as an app: a still figure without a front end, a panel under Voila."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / 'nbs' / 'apps' / 'explore.ipynb'


def test_without_a_front_end_it_is_a_figure(monkeypatch):
    monkeypatch.delenv('MPLBACKEND')  # the kernel's own shows a figure that a cell returns
    nb = nbformat.read(APP, as_version=4)
    NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    shown = [set(o.get('data', ())) for cell in nb.cells for o in cell.get('outputs', ())]
    assert any('image/png' in kinds for kinds in shown), shown
    assert not any('application/vnd.jupyter.widget-view+json' in kinds for kinds in shown)


@pytest.fixture
def voila(tmp_path):
    "The address of the app."
    if shutil.which('voila') is None:
        pytest.skip('voila is not installed; it is the extra `app`')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    words = ['voila', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1', str(APP)]
    log = open(tmp_path / 'voila.log', 'w')
    process = subprocess.Popen(words, stdout=log, stderr=log, env=dict(os.environ))
    yield f'http://127.0.0.1:{port}/'
    process.terminate()
    process.wait(20)
    log.close()


PICTURE = """(i => i && i.naturalWidth > 0 ? i.src : '')(document.querySelector('.widget-image'))"""
SLIDER = "document.querySelector('.widget-slider .noUi-handle')"


def test_under_voila_a_slider_changes_the_picture(voila, tmp_path):
    browser = pytest.importorskip('browser', reason='the package websocket-client is missing')
    if browser.PATH is None:
        pytest.skip('no Chromium is installed')
    page = browser.Browser(tmp_path / 'chromium', wait=150)
    try:
        page.until(lambda: answers(voila))
        page.open(voila)
        before = page.until(lambda: page.value(PICTURE))
        page.value(f'{SLIDER}.focus()')
        for _ in range(3):
            page.press('ArrowRight')
        page.until(lambda: page.value(PICTURE) not in ('', before))
        (tmp_path / 'app.png').write_bytes(page.picture())
    finally:
        page.close()


def answers(url):
    "Whether the server listens."
    with socket.socket() as s:
        return s.connect_ex(('127.0.0.1', int(url.rsplit(':', 1)[1].strip('/')))) == 0
