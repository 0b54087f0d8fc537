"Runs that take no time and end in a chosen way, for tests of what makes many; $LOG is told of each."

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xcl.runs import Run, RunConfig

LOG = Path(os.environ['LOG'])


def note(text):
    with LOG.open('a') as f:
        f.write(f'{text}\n')


@dataclass(frozen=True)
class Toss(RunConfig):
    "Appends to a log when it is made; `how` says what happens first."

    number: int
    how: str = 'well'  # 'fail' | 'die' | 'die once' | 'sleep' | 'wait'
    after: tuple = ()

    @property
    def slug(self):
        return f'toss-{self.number}'

    def make(self, run):
        assert all(Run(c).done for c in self.after)
        mark = LOG.with_name(f'{self.slug}.died')
        if self.how == 'fail':
            raise ValueError(f'{self.slug} does not like it')
        if self.how == 'sleep':
            time.sleep(600)
        while self.how == 'wait' and not LOG.with_name('go').exists():
            time.sleep(0.05)
        if self.how == 'die' or (self.how == 'die once' and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        note(f'{self.number} {os.getpid()}')
        run.finish(dict(number=self.number), [])


@dataclass(frozen=True)
class Count(RunConfig):
    "Counts to `steps`, with a checkpoint after each; a log says from where."

    steps: int
    together = True

    def make(self, run):
        found = run.load_checkpoint()
        step = found[1]['step'] if found else 0
        note(f'from {step}')
        while step < self.steps:
            time.sleep(0.1)
            step += 1
            run.save_checkpoint(dict(step=torch.tensor(step)), dict(step=step, steps=self.steps))
        run.finish(dict(steps=step), [])
