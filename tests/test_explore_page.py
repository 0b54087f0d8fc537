"""The explorer page in headless Chromium: sliders are moved, and its numbers held against the networks'."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

browser = pytest.importorskip('browser', reason='the package websocket-client is missing')
if browser.PATH is None:
    pytest.skip('no Chromium is installed', allow_module_level=True)

from xcl.data import inputs  # noqa: E402
from xcl.images import image_set  # noqa: E402
from xcl.paper.answers import answers, load_networks, one_of_each  # noqa: E402
from xcl.paper.explore_page import LARGEST, STEPS, explore_html  # noqa: E402
from xcl.paper.predictions import mixed_pair  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'outputs' / 'explore' / 'index.html'

SAID = """[...document.querySelectorAll('#answers section')].map(section => [section.dataset.network,
  [...section.querySelectorAll('.value')].map(value => Number(value.textContent))])"""
BARS = """[...document.querySelectorAll('#answers .row')].map(row =>
  100 * row.querySelector('.bar').getBoundingClientRect().width
  / row.querySelector('.track').getBoundingClientRect().width)"""
PIXELS = """(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])(
  document.getElementById('mixed'))"""


@pytest.fixture(scope='module')
def networks():
    return load_networks(PAGE.parent / 'demo')


@pytest.fixture(scope='module')
def shown():
    return inputs(one_of_each(image_set('digits', size=16).test))[0]


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    found = browser.Browser(tmp_path_factory.mktemp('chromium'))
    found.open(PAGE.as_uri(), 'document.querySelectorAll("#answers .value").length > 0')
    yield found
    found.close()


def move(page, name, value):
    page.value(f"""(e => {{ e.value = {value}; e.dispatchEvent(new Event('input')); }})(
        document.getElementById('{name}'))""")


def pick(page, name, value):
    page.value(f"""document.querySelector('input[name={name}][value="{value}"]').click()""")


PLACES = [('mixup', 3, 5, 20, 1.0), ('cutmix', 8, 0, 33, 4.0), ('mixup', 9, 1, 50, 0.5)]


@pytest.mark.parametrize('place', PLACES)
def test_the_numbers_are_those_of_the_networks(page, networks, shown, place):
    mix, a, b, step, T = place
    pick(page, 'mix', mix)
    pick(page, 'a', a)
    pick(page, 'b', b)
    move(page, 'lam', step)
    move(page, 'T', T)
    lam = torch.tensor([step / (STEPS - 1)])
    x, kept = mixed_pair(shown[[a, b]], lam, mix)
    found = dict(page.value(SAID))
    assert list(found) == ['teacher', 'ERM', 'KD', 'XCL-Mix']
    for name, p in answers(networks, x, T).items():
        np.testing.assert_allclose(found[name], 100 * p[0], atol=0.2, err_msg=name)
    assert page.value("document.getElementById('lam-out').textContent") == f'{kept[0]:.2f}'
    pixels = np.reshape(page.value(PIXELS), (16, 16, 4))[..., :3]
    np.testing.assert_allclose(pixels, 255 * x[0].permute(1, 2, 0), atol=1)
    drawn = np.reshape(page.value(BARS), (4, 10))
    np.testing.assert_allclose(drawn, list(found.values()), atol=0.5, err_msg='length of bars')


def test_the_keyboard_moves_the_slider(page):
    move(page, 'lam', 10)
    before = page.value(SAID)
    page.value("document.getElementById('lam').focus()")
    page.press('ArrowRight')
    assert page.value("document.getElementById('lam').value") == '11'
    assert page.value(SAID) != before
    page.press('Tab')
    assert page.value('document.activeElement.id') == 'T'


def test_the_picture_shows_bars_in_the_colours_of_the_methods(page):
    "A screenshot has teacher's black, KD's orange and XCL's blue."
    pixels = np.asarray(Image.open(io.BytesIO(page.picture())).convert('RGB')).astype(int)
    for colour in (0xD9, 0x7D, 0x1F), (0x00, 0x5A, 0x9F):
        near = np.abs(pixels - colour).sum(2) < 12
        assert near.sum() > 200, f'{colour} is not seen'


def test_the_committed_page_is_that_of_the_committed_networks(networks):
    "But for the last digits of the logits, which depend on the processor."
    text = PAGE.read_text(encoding='utf-8')
    assert len(text.encode()) <= LARGEST
    made = explore_html(networks, image_set('digits', size=16).test)
    cut = lambda page: (
        page.split('"logits": "')[0].split('"scale"')[0],
        page.split('</script>', 1)[1],
    )
    assert cut(made) == cut(text), 'make explore OUT=outputs/explore/index.html'
