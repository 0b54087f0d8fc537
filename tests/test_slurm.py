"`python -m xcl.launch PLAN --slurm`: each run a job, by submitit's own executors and as a script for Slurm."

import os
import signal
import subprocess
import sys
import time

import pytest

from xcl import launch
from xcl.files import read_json
from xcl.plan import write_plan
from xcl.runs import Run

pytest.importorskip('submitit', reason='submitit is not installed: pip install "xcl[slurm]"')


def words(plan, *more):
    return [
        str(plan),
        '--slurm',
        '--allow',
        'tosses',
        '--device',
        'cpu',
        '--gpus-per-run',
        '0',
        *more,
    ]


def start(plan, configs, *more):
    write_plan(plan, configs)
    line = [sys.executable, '-m', 'xcl.launch', *words(plan, *more)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def log(tmp_path):
    return (tmp_path / 'log').read_text().splitlines()


def test_a_job_that_fails_stops_only_those_that_need_it(tosses, tmp_path):
    bad, deadly, good = tosses.Toss(0, 'fail'), tosses.Toss(1, 'die'), tosses.Toss(2)
    pupils = [tosses.Toss(10, after=(bad,)), tosses.Toss(12, after=(good,))]
    job = start(tmp_path / 'plan.json', [*pupils, bad, deadly, good], '--executor', 'local')
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 1, output
    assert [line.split()[0] for line in log(tmp_path)] == ['2', '12']
    tail = output[output.index('3 of 5 runs failed') :]
    assert 'toss-0: ValueError: toss-0 does not like it' in tail
    assert 'toss-10: RuntimeError: toss-10 needs toss-0, not finished' in tail
    assert 'toss-1: ' in tail
    write_plan(tmp_path / 'plan.json', [good, pupils[1]])
    launch.main(words(tmp_path / 'plan.json', '--executor', 'debug'))  # nothing is made twice
    assert len(log(tmp_path)) == 2


def test_a_job_out_of_time_goes_on_from_its_checkpoint(tosses, tmp_path):
    count = tosses.Count(30)
    job = start(tmp_path / 'plan.json', [count], '--executor', 'local')
    checkpoint, deadline = Run(count).checkpoint, time.monotonic() + 60
    while not checkpoint.exists():
        assert time.monotonic() < deadline and job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    holder = read_json(checkpoint.with_name('holder.json'))['pid']
    os.kill(holder, signal.SIGUSR2)  # as Slurm does before the time is up
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 0 and Run(count).result == dict(steps=30), output
    first, second = (int(line.split()[1]) for line in log(tmp_path))
    assert first == 0 < second < 30


def test_a_run_shared_by_two_processes(tosses, tmp_path):
    count = tosses.Count(2)
    job = start(tmp_path / 'plan.json', [count], '--executor', 'local', '--world-size', '2')
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0 and Run(count).done, output
    assert log(tmp_path) == ['from 0', 'from 0']  # each of the two ranks


def test_in_this_very_process(tosses, tmp_path, capsys):
    write_plan(tmp_path / 'plan.json', [tosses.Toss(1), tosses.Toss(0, 'fail')])
    with pytest.raises(
        SystemExit, match='1 of 2 runs failed:\ntoss-0: ValueError: toss-0 does not'
    ):
        launch.main(words(tmp_path / 'plan.json', '--executor', 'debug'))
    assert 'toss-1  finished' in capsys.readouterr().out


SBATCH = """#!{python}
import os, pathlib, sys
folder = pathlib.Path(__file__).parent
number = 17 + len([*folder.glob('script-*')])
(folder / f'script-{number}').write_text(pathlib.Path(sys.argv[-1]).read_text())
print('Submitted batch job', number)
"""


def test_the_scripts_that_slurm_gets(tosses, tmp_path, monkeypatch):
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name in 'sbatch', 'srun':
        (tools / name).write_text(SBATCH.replace('{python}', sys.executable))
        (tools / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tools}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setattr(launch, 'follow', lambda configs, jobs: None)  # no such queue
    teachers = tuple(tosses.Toss(k) for k in range(3))
    write_plan(tmp_path / 'plan.json', [tosses.Toss(9, after=teachers), *teachers])
    more = ['--gpus-per-run', '2', '--hours', '4', '--sbatch', 'partition=big', '--workers', '2']
    launch.main([*words(tmp_path / 'plan.json'), *more])
    first, second = ((tools / f'script-{n}').read_text() for n in (17, 18))
    for line in 'array=0-2%2', 'gpus-per-node=2', 'ntasks-per-node=2', 'time=240', 'partition=big':
        assert f'#SBATCH --{line}\n' in first, first
    assert '#SBATCH --signal=USR2@120\n' in first and 'dependency' not in first
    assert '#SBATCH --dependency=afterany:17\n' in second and 'array' not in second


def test_refused_before_anything_is_submitted(tosses, tmp_path, monkeypatch):
    write_plan(tmp_path / 'plan.json', [tosses.Toss(1)])
    plan = tmp_path / 'plan.json'
    monkeypatch.setenv('PATH', str(tmp_path))
    for more, refusal in {
        ('--hours', '0.01'): 'hours is 0.01; allowed: 5 minutes',
        ('--gpus-per-run', '-1'): 'gpus is -1; allowed: 0 or more',
        ('--run', '0'): 'allowed: one of them',
        (): 'Submit on a machine that has `srun` and `sbatch`',
    }.items():
        with pytest.raises(SystemExit, match=refusal):
            launch.main(words(plan, *more))
    with pytest.raises(SystemExit, match='--run is 1; allowed: 0 to 0'):
        launch.main([str(plan), '--allow', 'tosses', '--device', 'cpu', '--run', '1'])


def test_a_run_waits_for_its_teacher(tosses, tmp_path):
    teacher = tosses.Toss(1)
    write_plan(plan := tmp_path / 'plan.json', [teacher, tosses.Toss(2, after=(teacher,))])
    one = [str(plan), '--allow', 'tosses', '--device', 'cpu', '--run']
    with pytest.raises(SystemExit, match='toss-2 needs toss-1, not finished'):
        launch.main([*one, '1'])
    launch.main([*one, '0'])
    launch.main([*one, '1'])
    assert [line.split()[0] for line in log(tmp_path)] == ['1', '2']
