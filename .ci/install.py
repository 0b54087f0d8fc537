"""Install a package into the environment of this interpreter: `python install.py -c lock.txt -e '.[dev]'`.

The arguments are those of `pip install` that uv has, too. uv takes seconds where pip takes minutes, but does
not read pip's configuration, so what that says of indexes, certificates and constraints is passed on. Where
uv cannot be had, or cannot do it, pip does it."""

import ast
import os
import subprocess
import sys

PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
# pip's configuration -> options of `uv pip install`, and variables that uv reads
OPTIONS = {k: f'--{k}' for k in ('index-url', 'extra-index-url', 'find-links', 'constraint')}
OPTIONS['trusted-host'] = '--allow-insecure-host'
VARIABLES = {'cert': 'SSL_CERT_FILE', 'proxy': 'ALL_PROXY'}
VARIABLES |= dict.fromkeys(('timeout', 'default-timeout'), 'UV_HTTP_TIMEOUT')  # pip has both names
# as pip does: the best version that any index has
LIKE_PIP = ['--index-strategy', 'unsafe-best-match', '--python', sys.executable]


def pip_config() -> dict:  # {option: value}; the command's own section and the environment win
    "Return what pip is configured to do, e.g. {'index-url': 'https://mirror/simple'}."
    listed = subprocess.run([*PIP, 'config', 'list'], stdout=subprocess.PIPE, text=True, check=True)
    found = {}
    for section in ('global', 'install', ':env:'):
        for line in listed.stdout.splitlines():
            name, _, value = line.partition('=')
            if name.startswith(f'{section}.'):
                found[name.removeprefix(f'{section}.')] = ast.literal_eval(value)
    return found


def uv_options(config: dict) -> list:  # e.g. ['--index-url', 'https://mirror/simple']
    "Return the options of `uv pip install` that do what pip's configuration says."
    return [
        word
        for name in OPTIONS
        for value in config.get(name, '').split()
        for word in (OPTIONS[name], value)
    ]


def uv_install(arguments: list) -> int:  # exit status
    "Install with uv; print what it fetches, without a line for each package."
    config = pip_config()
    env = {VARIABLES[k]: config[k] for k in VARIABLES if k in config} | os.environ
    command = [sys.executable, '-m', 'uv', 'pip', 'install', *LIKE_PIP, *uv_options(config)]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=env) as uv:
        for line in uv.stderr:
            if not line.startswith((' + ', ' - ', ' ~ ')):
                print(f'  {line}', end='', flush=True)
    return uv.returncode


def main(arguments: list) -> int:  # exit status
    "Install uv, and with it the rest; with pip where that fails."
    has_uv = subprocess.run([*PIP, 'install', '-q', 'uv']).returncode == 0
    if has_uv and uv_install(arguments) == 0:
        return 0
    print('  uv did not do it; pip does, which takes minutes longer', flush=True)
    return subprocess.run([*PIP, 'install', *arguments]).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
