"Exit 0 if this interpreter has xcl installed from this checkout, with all that settings.ini requires."

import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # an environment that has just been made
    sys.exit(1)

root = Path(__file__).resolve().parent.parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(root / 'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']


def satisfied(req):
    req = Requirement(req)
    try:
        return req.specifier.contains(version(req.name), prereleases=True)
    except PackageNotFoundError:
        return False


spec = find_spec(cfg['lib_name'])
here = (
    spec is not None
    and spec.origin is not None
    and Path(spec.origin).resolve().is_relative_to(root)
)
sys.exit(
    not (
        here
        and all(satisfied(r) for r in f'{cfg["requirements"]} {cfg["dev_requirements"]}'.split())
    )
)
