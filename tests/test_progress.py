"""Progress bars: seen in a terminal and in a live Jupyter front end, silent where nobody looks."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from jupyter_client.manager import start_new_kernel

BAR = """
from xcl.runtime import progress
with progress(3, desc='counting') as bar:
    shown = not bar.disable
    for _ in range(3): bar.update()
print(shown)
"""


@pytest.fixture(scope='module')
def kernel():
    manager, client = start_new_kernel(kernel_name='python3')
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize('attached', [True, False])
def test_jupyter(kernel, attached):
    "A bar in a front end that answers input(); none in papermill and nbconvert, which cannot."
    printed = []
    kernel.execute_interactive(
        BAR,
        allow_stdin=attached,
        timeout=120,
        output_hook=lambda m: (
            printed.append(m['content'].get('text', '')) if m['msg_type'] == 'stream' else None
        ),
    )
    assert ''.join(printed).strip().endswith(str(attached))


def test_pipe():
    done = subprocess.run([sys.executable, '-c', BAR], capture_output=True, text=True, check=True)
    assert (done.stdout, 'counting' in done.stderr) == ('False\n', False)


def test_terminal():
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    os.set_blocking(controller, False)
    done = subprocess.run(
        [sys.executable, '-c', BAR], stdout=subprocess.PIPE, stderr=terminal, text=True, check=True
    )
    drawn = os.read(controller, 10_000)  # while our end of the terminal is still open
    os.close(terminal)
    assert done.stdout == 'True\n' and b'counting' in drawn
