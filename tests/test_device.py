"""Every kind of training, and what comes after it, on a device that is none, since there may be no GPU.

Its tensors hold real numbers and refuse to meet tensors of the CPU (pretend.py). The programs are processes
of their own, since a device stays registered to the end of its process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

if not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'):
    pytest.skip('this PyTorch has no devices in Python', allow_module_level=True)

HERE = Path(__file__).resolve().parent
# how often a step waits for the device; to be made smaller, never larger
WAITS = {
    **dict.fromkeys((f'gaze {k}' for k in ('ERM', 'MixUp', 'KD', 'XCL-Mix')), 0),
    'gaze XCL-Sim': 7,
    **dict.fromkeys((f'resnet18 {k}' for k in ('ERM', 'LS', 'CutMix', 'XCL-Mix')), 0),
    'resnet18 KD half': 0,
    'resnet18 XCL-Mix stored': 1,
    'resnet18 XCL-GAN online': 9,
    'resnet18 XCL-GAN offline': 5,
    'binary_resnet18 ERM': 0,
    'pyramidnet CutMix': 0,
    'photographs ERM': 34,
    'photographs XCL-Mix': 34,
    'BigGAN DiffAugment': 0,
    'SimGAN': 0,
}
SECTIONS = {f'section {k}' for k in ('gaze', 'resnet18', 'gan', 'imagenet')}


def start(part, folder):
    "The program, at work on a part."
    folder.mkdir()
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='Agg')
    command = [sys.executable, HERE / 'on_pretended.py', part, folder]
    out, err = (open(folder / name, 'w') for name in ('out', 'err'))
    return subprocess.Popen(command, env=env, stdout=out, stderr=err), folder


def facts_of(child, folder):
    "What a program says of each case: name -> facts."
    code = child.wait(600)
    assert code == 0, (folder / 'err').read_text()[-3000:]
    lines = [k for k in (folder / 'out').read_text().splitlines() if k.startswith('{"name"')]
    return {facts.pop('name'): facts for facts in map(json.loads, lines)}


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Facts of both parts, which run side by side."
    top = tmp_path_factory.mktemp('pretended')
    started = {part: start(part, top / part) for part in ('steps', 'after')}
    return {part: facts_of(*child) for part, child in started.items()}


def errors(facts):
    "Cases that failed: name -> why, where."
    return {k: (v['error'], v['where']) for k, v in facts.items() if 'error' in v}


def test_no_step_mixes_devices(parts):
    assert not errors(parts['steps'])
    assert set(parts['steps']) == set(WAITS)


def test_steps_give_the_bits_of_the_cpu(parts):
    assert not [k for k, v in parts['steps'].items() if not v.get('same')]
    assert not [k for k, v in parts['steps'].items() if not v.get('close', True)]


def test_steps_wait_no_more_than_they_did(parts):
    found = {k: v['waits'] for k, v in parts['steps'].items() if 'waits' in v}
    assert not {k: v for k, v in found.items() if sum(v.values()) > WAITS[k]}


def test_nothing_after_training_mixes_devices(parts):
    assert not errors(parts['after'])
    assert set(parts['after']) == SECTIONS


def test_sections_use_the_device(parts):
    assert not [k for k, v in parts['after'].items() if not v.get('crossings')]
