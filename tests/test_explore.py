"""Explorers: a panel that answers to a front end's messages where one is attached, a figure where nobody looks."""

import os

import pytest
from jupyter_client.manager import start_new_kernel

ASK = """
import torch
from xcl.data import Examples
from xcl.explore import explore_mixing, show_picture
from xcl.runs import home
names = 'dark_grey', 'light_grey'
examples = Examples(torch.tensor([50, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8), torch.arange(2))
def f(x): return torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)
picture = explore_mixing(f, examples, names)
show_picture(picture, 'a caption', home()/'explore.png')
print(type(picture).__name__, (home()/'explore.png').exists())
"""


@pytest.fixture(scope='module')
def client(tmp_path_factory):
    manager, client = start_new_kernel(
        kernel_name='python3', env=dict(os.environ, XCL_HOME=str(tmp_path_factory.mktemp('home')))
    )
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


def test_live(client):
    "The panel is shown, and a slider's message changes its picture."
    printed, shown = execute(client, ASK, attached=True)
    assert printed == 'VBox False\n' and 'application/vnd.jupyter.widget-view+json' in shown
    slider = execute(
        client,
        'before = picture.children[1].value; print(picture.children[0].children[0].model_id)',
        attached=True,
    )[0].strip()
    state = dict(comm_id=slider, data=dict(method='update', state=dict(value=0.1), buffer_paths=[]))
    client.shell_channel.send(client.session.msg('comm_msg', state))
    after = "print(picture.children[0].children[0].value, picture.children[1].value not in (before, b''))"
    assert execute(client, after, attached=True)[0] == '0.1 True\n'


def test_nobody_looks(client):
    "A figure, written and shown, and no widget."
    printed, shown = execute(client, ASK, attached=False)
    assert (
        printed == 'Figure True\n'
        and 'image/png' in shown
        and not any('widget' in kind for kind in shown)
    )
