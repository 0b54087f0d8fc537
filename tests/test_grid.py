"""`python -m xcl.launch PLAN --workers N`: runs side by side, some of which fail or are killed."""

import collections
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from xcl.plan import write_plan
from xcl.runs import Run


def start(plan, configs, workers):
    write_plan(plan, configs)
    words = [str(plan), '--workers', str(workers), '--allow', 'tosses', '--device', 'cpu']
    line = [sys.executable, '-m', 'xcl.launch', *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launched(tmp_path, configs, workers=2):
    "Output, exit code, and the log as number -> processes that finished this run."
    job = start(tmp_path / 'plan.json', configs, workers)
    output = job.communicate(timeout=300)[0]
    made = collections.defaultdict(list)
    for line in (tmp_path / 'log').read_text().splitlines():
        number, process = line.split()
        made[int(number)].append(process)
    return output, job.returncode, made


def test_runs_whose_processes_are_killed_are_made_once_each(tosses, tmp_path):
    configs = [tosses.Toss(k, 'die once' if k % 20 == 7 else 'well') for k in range(40)]
    output, code, made = launched(tmp_path, configs)
    assert code == 0, output
    assert {k: len(v) for k, v in made.items()} == dict.fromkeys(range(40), 1)
    assert len({p for v in made.values() for p in v}) > 2  # the dead were replaced
    assert output.count('its process died by signal 9') == 2
    again, code, made = launched(tmp_path, configs)  # nothing is made twice
    assert code == 0 and '0 of 40 runs to make' in again and len(made) == 40


def test_a_run_that_fails_stops_only_those_that_need_it(tosses, tmp_path):
    bad, deadly, good = tosses.Toss(0, 'fail'), tosses.Toss(1, 'die'), tosses.Toss(2)
    pupils = [tosses.Toss(10 + k, after=(t,)) for k, t in enumerate((bad, deadly, good))]
    output, code, made = launched(tmp_path, [*pupils, bad, deadly, good])
    assert code == 1 and {*made} == {2, 12}, output
    tail = output[output.index('4 of 6 runs failed') :]
    assert 'toss-0: ValueError: toss-0 does not like it' in tail
    assert 'toss-1: its process died 3 times, at last by signal 9' in tail
    assert 'toss-10: needs toss-0, which failed' in tail and 'toss-11: needs toss-1' in tail
    assert Run(pupils[2]).done and not Run(pupils[0]).done


def test_a_worker_that_dies_while_it_has_no_run_is_replaced(tosses, tmp_path):
    quick, slow = tosses.Toss(0), tosses.Toss(1, 'wait')
    configs = [quick, slow, tosses.Toss(2, after=(slow,)), tosses.Toss(3, after=(slow,))]
    job = start(tmp_path / 'plan.json', configs, 2)
    while 'toss-0' not in job.stdout.readline():  # its worker has answered, and waits for a number
        assert job.poll() is None
    idle = (tmp_path / 'log').read_text().split()[1]
    os.kill(int(idle), signal.SIGKILL)
    while os.path.exists(f'/proc/{idle}'):
        time.sleep(0.05)  # its pipe is open until its last thread has ended
    (tmp_path / 'go').touch()
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and '4/4' in output, output
    assert 'process died' not in output  # no attempt was lost


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tosses, tmp_path, how):
    job = start(tmp_path / 'plan.json', [tosses.Toss(k, 'sleep') for k in range(2)], 2)
    deadline = time.monotonic() + 60
    while len(workers := forked(job.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(how)
    job.wait(60)
    while any(os.path.exists(f'/proc/{w}') for w in workers):
        assert time.monotonic() < deadline, 'a worker lives on'
        time.sleep(0.1)


def children(pid):
    "Processes whose parent this is."
    found = []
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            parent = re.search(r'PPid:\s(\d+)', open(f'/proc/{p}/status').read())[1]
        except OSError:
            continue
        if int(parent) == pid:
            found.append(int(p))
    return found


def forked(pid):
    "Workers of a job: forked by the server that it has started."
    return [worker for server in children(pid) for worker in children(server)]


def test_side_by_side_or_shared_not_both(tosses, tmp_path):
    write_plan(tmp_path / 'plan.json', [tosses.Toss(1)])
    line = [sys.executable, '-m', 'xcl.launch', str(tmp_path / 'plan.json'), '--workers', '2']
    done = subprocess.run([*line, '--world-size', '2'], capture_output=True, text=True)
    assert done.returncode == 1 and 'allowed: one of both' in done.stderr
    assert 'Traceback' not in done.stderr
