"""records.csv from log.txt: the scores that `python -m xcl.paper.few_images` printed of each finished run.

The command trained all 32 students and then stopped in `collect` (scoring the teacher on the test images: they
were on the CPU, the teacher on the GPU; mended since), and the machine was given back before that was seen. So
the folders of the runs are lost, and with them the teacher's score on the test images. The log has the first 120
characters of every result: whole numbers of the first four metrics, and the leading digits of the targets'
entropy. The lines of a size follow each other, in the order of nbs/settings/few_images.yaml. Commit dadabcee375f,
clean; folders of that machine are cut from the paths."""

import json
import re
from pathlib import Path

import pandas as pd
import yaml

HERE = Path(__file__).parent
ROWS = {'erm': 'ERM', 'mixup': 'MixUp', 'kd': 'KD', 'xcl-mix': 'XCL-Mix'}
LINE = re.compile(r'\d+/32  resnet18-width64-(\S+)-seed(\d)  finished: \{(.*)')


def main():
    setting = yaml.safe_load((HERE.parents[2] / 'nbs/settings/few_images.yaml').read_text())
    found = LINE.findall((HERE / 'log.txt').read_text())
    cells = [(size, seed) for size, seeds in setting['sizes'].items() for seed in seeds]
    lines = []
    for (size, seed), four in zip(cells, zip(*[iter(found)] * 4), strict=True):
        assert {(ROWS[row], int(s)) for row, s, _ in four} == {(r, seed) for r in ROWS.values()}
        for row, _, text in four:
            values = {k: float(v) for k, v in re.findall(r'"(\w+)": ([\d.]+)', text)}
            values.pop('steps', None)  # cut off
            values['entropy'] = 100 * values.pop('target_entropy')
            one = dict(size=size, row=ROWS[row], seed=seed)
            lines += [dict(one, metric=m, value=round(v, 5)) for m, v in values.items()]
    (gauge,) = json.loads((HERE / 'gauges.json').read_text())
    frame = pd.DataFrame(lines).assign(steps=gauge['steps'])
    frame.to_csv(HERE / 'records.csv', index=False)


if __name__ == '__main__':
    main()
