"""The paper's regime in small: a setting's gauges, then its sections, as far as the time goes. A GPU's work.

    python benchmarks/campaign.py --data-dir CIFAR100 --out DIR --minutes 9
    python benchmarks/campaign.py --tiny --out DIR       digits on a CPU: a test of this script

The setting is nbs/settings/memorised.yaml. Its length is found by a rule that looks at no student: LENGTHS
are tried in turn, with ERM and the teacher of another split and seed. The first that meets the gauges of
nbs/lib/paper/39_gauges is that of all runs. Where none does, nothing else is trained.

DIR/gauges.json has what was measured at each length; DIR/reports.tar the reports of the sections that are
finished, rewritten after each; DIR/runs-<kk>.tar the runs themselves, without what only training needs, in
parts that are small enough to be moved. Unpack them in $XCL_HOME: `make publish` finds all runs finished."""

import argparse
import tarfile
import time
from pathlib import Path

import yaml

from xcl.files import home, root, write_json
from xcl.grid import work_off
from xcl.paper.cifar import CifarSection, ResNet18Params
from xcl.paper.gauges import gauges_met, section_gauges
from xcl.paper.smoothing import SmoothingParams, SmoothingSection
from xcl.paper.temperature import TemperatureParams, TemperatureSection
from xcl.plan import write_plan

LENGTHS = 0.5, 1.0, 2.0  # of the recipe's 400 epochs
SPLIT = dict(val_fraction=0.1, seed=900, seeds=1)  # the images that are held out are no run's
SECTIONS = (
    (CifarSection, ResNet18Params, 'resnet18'),
    (SmoothingSection, SmoothingParams, 'label_smoothing'),
    (TemperatureSection, TemperatureParams, 'temperature'),
)
TINY = dict(preset='smoke', device='cpu', width=4, seeds=2, members=2)
PART = 15 * 2**20  # bytes of a part of the runs


def measure(given, budget, workers):
    "The gauges at a length, and whether they are met."
    P = ResNet18Params.of(**given | SPLIT | dict(budget=budget))
    exp = CifarSection('gauges', P)
    configs = [exp.student(exp.rows['ERM'], P.seed), *exp.teachers(P.seed)]
    plan = home() / 'plans' / f'gauges-{budget:g}.json'
    write_plan(plan, configs)
    work_off(plan, configs, exp.runtime, workers)
    found = section_gauges(exp)
    return dict(budget=budget, **found, met=gauges_met(found))


def gauged_length(given, lengths, workers, out, tiny):
    "The first length that meets the gauges; None where none does. Writes gauges.json after each."
    measured = []
    for budget in lengths:
        measured.append(measure(given, budget, workers))
        print(measured[-1], flush=True)
        write_json(out / 'gauges.json', measured)
        if measured[-1]['met'] or tiny:
            return budget
    return None


def pack(out, packed):
    "Write the reports, and archives of the finished runs of $XCL_HOME that are not among `packed`."
    with tarfile.open(out / 'reports.tar', 'w') as tar:
        tar.add(home() / 'reports', 'reports')
    folders = sorted({p.parent for p in home().glob('*/result.json')} - packed)
    packed.update(folders)
    files = [p for f in folders for p in sorted(f.iterdir()) if not p.name.startswith('checkpoint')]
    tar, size = None, PART
    for path in files:
        if size + path.stat().st_size > PART:
            tar and tar.close()
            tar, size = tarfile.open(out / f'runs-{len([*out.glob("runs-*")]):02}.tar', 'w'), 0
        tar.add(path, path.relative_to(home()))
        size += path.stat().st_size
    tar and tar.close()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, required=True, help='folder of what is written')
    p.add_argument('--data-dir', default='', help='folder of CIFAR-100')
    p.add_argument('--setting', default='memorised', help='name of a file in nbs/settings')
    p.add_argument('--workers', type=int, default=3, help='runs made side by side')
    p.add_argument('--minutes', type=float, default=1e9, help='no section is begun after these')
    p.add_argument('--tiny', action='store_true', help='digits, seconds; whatever the gauges say')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * a.minutes
    text = (root() / 'nbs' / 'settings' / f'{a.setting}.yaml').read_text(encoding='utf-8')
    given = TINY if a.tiny else yaml.safe_load(text) | dict(data_dir=a.data_dir)
    given = given | dict(setting=a.setting, parallel=a.workers)
    lengths = (0.005, 0.01) if a.tiny else LENGTHS
    budget = gauged_length(given, lengths, a.workers, a.out, a.tiny)
    if budget is None:
        raise SystemExit('no length meets the gauges, so no student of the teacher is trained')
    packed = set()
    for old in a.out.glob('runs-*.tar'):  # of an earlier call: their runs are packed anew
        old.unlink()
    for Section, Params, name in SECTIONS:
        if time.monotonic() > end:
            print(f'{name}: not begun, {a.minutes:g} minutes are over')
            break
        exp = Section(name, Params.of(**given | dict(budget=budget))).run()
        top1 = exp.records[exp.records.metric == 'top1'].groupby('row').value.mean()
        print(name, top1.round(2).to_dict(), flush=True)
        pack(a.out, packed)


if __name__ == '__main__':
    main()
