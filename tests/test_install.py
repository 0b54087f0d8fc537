"Set-up: uv is told what pip's configuration says, and pip takes over where uv fails."

import os
import runpy
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent / '.ci' / 'install.py'


@pytest.fixture(scope='module')
def install():
    return runpy.run_path(str(INSTALL))


def test_configuration_of_pip_is_read(install, tmp_path, monkeypatch):
    file = tmp_path / 'pip.conf'
    file.write_text(
        '[global]\nextra-index-url =\n  https://a/simple\n  https://b/simple\nfind-links = /old\n'
        '[install]\nconstraint = c.txt\n'
    )
    for name in [name for name in os.environ if name.startswith('PIP_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('PIP_CONFIG_FILE', str(file))
    monkeypatch.setenv('PIP_FIND_LINKS', '/new')
    config = install['pip_config']()
    assert config['extra-index-url'].split() == ['https://a/simple', 'https://b/simple']
    assert (config['find-links'], config['constraint']) == ('/new', 'c.txt')


def test_options_of_uv(install):
    config = {'extra-index-url': '\nhttps://a\nhttps://b', 'trusted-host': 'a', 'cert': 'x.pem'}
    wanted = '--extra-index-url https://a --extra-index-url https://b --allow-insecure-host a'
    assert install['uv_options'](config) == wanted.split()
    assert install['uv_options']({}) == []


@pytest.mark.parametrize('fails', ['having uv', 'installing with it', 'nothing'])
def test_pip_takes_over(install, monkeypatch, capsys, fails):
    ran = []

    def run(command, **_):
        ran.append(command[command.index('install') + 1 :])
        return subprocess.CompletedProcess(command, 'uv' in command and fails == 'having uv')

    monkeypatch.setattr(subprocess, 'run', run)
    main = install['main']
    monkeypatch.setitem(main.__globals__, 'uv_install', lambda _: fails == 'installing with it')
    assert main(['-e', '.']) == 0
    assert ran == [['-q', 'uv']] + [['-e', '.']] * (fails != 'nothing')
    assert ('pip does' in capsys.readouterr().out) == (fails != 'nothing')
