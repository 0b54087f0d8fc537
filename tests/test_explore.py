"Explorers: a panel where a front end is attached, a still figure elsewhere."

import os

import pytest
from jupyter_client.manager import start_new_kernel

SHOW = """
import torch
from xcl.data import Examples
from xcl.files import home
from xcl.paper.explore import explore_mixing
from xcl.paper.show import Page
names = 'dark_grey', 'light_grey'
x = torch.tensor([50, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
examples = Examples(x, torch.arange(2))
def predict(x): return torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)
picture = explore_mixing(predict, examples, names)
Page(home(), 'demo', 'two squares').show(picture, 'Mixtures')
print(type(picture).__name__, (home() / 'mixtures.png').exists())
"""


@pytest.fixture(scope='module')
def client(tmp_path_factory):
    env = dict(os.environ, XCL_HOME=str(tmp_path_factory.mktemp('home')))
    manager, client = start_new_kernel(kernel_name='python3', env=env)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, attached):
    "What a cell printed, and the kinds of data that it displayed."
    printed, shown = [], []

    def hook(m):
        assert m['msg_type'] != 'error', '\n'.join(m['content']['traceback'])
        if m['msg_type'] == 'stream':
            printed.append(m['content']['text'])
        if m['msg_type'] == 'display_data':
            shown.extend(m['content']['data'])

    client.execute_interactive(code, allow_stdin=attached, timeout=120, output_hook=hook)
    return ''.join(printed), set(shown)


def test_with_a_front_end(client):
    "The panel is shown, and a slider's message changes its picture."
    printed, shown = execute(client, SHOW, attached=True)
    assert printed == 'VBox False\n'
    assert 'application/vnd.jupyter.widget-view+json' in shown
    code = 'before = picture.children[1].value; print(picture.children[0].children[0].model_id)'
    slider = execute(client, code, attached=True)[0].strip()
    update = dict(method='update', state=dict(value=0.1), buffer_paths=[])
    message = client.session.msg('comm_msg', dict(comm_id=slider, data=update))
    client.shell_channel.send(message)
    code = (
        'print(picture.children[0].children[0].value, '
        "picture.children[1].value not in (before, b''))"
    )
    assert execute(client, code, attached=True)[0] == '0.1 True\n'


def test_without_a_front_end(client):
    "A figure, written and shown, and no widget."
    printed, shown = execute(client, SHOW, attached=False)
    assert printed == 'Figure True\n'
    assert 'image/png' in shown
    assert not any('widget' in kind for kind in shown)
