"""A device that is none: its tensors hold real numbers in the CPU's memory, and behave as on CUDA.

A tensor of it says that it lies on 'pretend'. It raises Mixed where it meets a tensor of the CPU and CUDA
would refuse that, and CROSSINGS notes every copy between the two and everything that waits for the device.
Importing this module registers the device for the rest of the process, so that it is meant for a program of
its own. It stands on PyTorch's PrivateUse1 key, the place of devices that PyTorch does not know."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import xcl

NAME = 'pretend'
PACKAGE = str(Path(xcl.__file__).parent) + os.sep
CROSSINGS = []  # of Crossing, in order
aten = torch.ops.aten


class Mixed(RuntimeError):
    "Tensors of two devices met."


@dataclass(frozen=True)
class Crossing:
    "A copy between the devices, or an operation that waits."

    what: str
    place: str  # in the package, 'file:line'
    waits: bool = True  # False: a copy to the device that is not waited for


def place():
    "The line of the package that is being executed, 'file:line'; '' outside of it."
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f'{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}' if frame else ''


def note(what, waits=True):
    "Note a crossing."
    CROSSINGS.append(Crossing(what, place(), waits))


# Tensors


class PretendTensor(torch.Tensor):
    "A tensor of the pretended device; `real` returns its numbers."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        layout = real.shape, real.stride(), real.storage_offset()
        device = torch.device(NAME, 0)
        return torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=real.dtype, device=device)

    def __init__(self, real):
        self.real_tensor = real

    def __repr__(self, **kw):
        return f'PretendTensor({self.real_tensor})'

    def tolist(self):
        return self.cpu().tolist()  # PyTorch's own refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check(op, args, kwargs)
        return compute(op, args, kwargs)


def mapped(f, v):
    "Nested tuples, lists and dicts with f of all that is in them."
    kind = type(v)
    if kind is tuple or kind is list:
        return kind([mapped(f, e) for e in v])
    return {k: mapped(f, e) for k, e in v.items()} if kind is dict else f(v)


def is_there(t):
    "Whether something is a tensor of the pretended device."
    return isinstance(t, PretendTensor)


def real(t):
    "The numbers of a tensor, on the CPU; anything else as it is."
    return t.real_tensor if is_there(t) else t


def tensors_in(*values):
    "All tensors in nested arguments."
    found = []
    mapped(lambda t: found.append(t) if isinstance(t, torch.Tensor) else None, values)
    return found


def compute(op, args, kwargs):
    "What an operation returns, on the device where CUDA would have it."
    known = {}  # numbers of the arguments -> argument, for what changes in place

    def down(t):
        if isinstance(t, torch.Tensor):
            known[id(real(t))] = t
        return real(t)

    def up(t):
        if not isinstance(t, torch.Tensor):
            return t
        return known[id(t)] if id(t) in known else PretendTensor(t) if stays else t

    device = kwargs.get('device')
    stays = device is None or torch.device(device).type == NAME
    if device is not None:
        kwargs = dict(kwargs, device=torch.device('cpu'))
    return mapped(up, op(*mapped(down, args), **mapped(down, kwargs)))


# What CUDA refuses, copies and waits for

WAITS = {
    aten._local_scalar_dense.default: 'a number is read',
    aten.nonzero.default: 'nonzero',
    aten.masked_select.default: 'masked_select',
    aten.equal.default: 'equal',
    aten._unique2.default: 'unique',
}
INDEXED = {  # whose index may lie on the CPU, at the price of a wait
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


def check(op, args, kwargs):
    "Note what waits. Raises Mixed for tensors of two devices."
    if op in WAITS:
        note(WAITS[op])
    if op is aten.copy_.default:
        to, source = args[:2]
        note_copy(source, is_there(to), kwargs.get('non_blocking') or (*args, False)[2])
    elif op is aten._to_copy.default:
        device = kwargs.get('device')
        there = is_there(args[0]) if device is None else torch.device(device).type == NAME
        note_copy(args[0], there, kwargs.get('non_blocking'))
    elif op in INDEXED:
        check_indexed(op, *args)
    else:
        check_together(op, tensors_in(args, kwargs))


def note_copy(source, there, non_blocking):
    "Note a copy of `source`, where it is one from device to device."
    if is_there(source) and not there:
        note('copy to the host')
    elif there and not is_there(source):
        note('copy to the device', waits=not non_blocking)


def check_indexed(op, x, index, *rest):
    "As `check`, for an operation that takes a list of indices."
    for i in tensors_in(index):
        if i.dtype in (torch.bool, torch.uint8):
            note('rows by a mask')
        elif not is_there(i):
            note('index on the host')
    check_together(op, [x, *tensors_in(rest)])
    if not is_there(x):
        raise Mixed(f'{op} at {place()}: a tensor of the CPU, its index on the device')


def check_together(op, tensors):
    "Raise Mixed unless all tensors lie on the device, but those of a single number."
    found = [t for t in tensors if t.ndim and not is_there(t)]
    if found and any(map(is_there, tensors)):
        shapes = [f'{tuple(t.shape)} on {t.device.type}' for t in tensors]
        raise Mixed(f'{op} at {place()}: {", ".join(shapes[:6])}')


# The device


class Backend(_DummyBackendModule):
    "What PyTorch asks a module of a device for."

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def empty(size, *, dtype=None, memory_format=None, **kw):
    "A tensor whose numbers are not set, as C++ asks for it."
    layout = memory_format or torch.contiguous_format
    return PretendTensor(torch.empty(size, dtype=dtype, memory_format=layout))


def empty_strided(size, stride, *, dtype=None, **kw):
    "As `empty`."
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, to, non_blocking=False):
    "What `torch.tensor(..., device=...)` copies with."
    note_copy(source, is_there(to), non_blocking)
    with torch._C._DisableTorchDispatch():
        real(to).copy_(real(source))
    return to


_setup_privateuseone_for_python_backend(NAME, Backend())
LIBRARY = torch.library.Library('aten', 'IMPL')
LIBRARY.impl('empty.memory_format', empty, 'PrivateUse1')
LIBRARY.impl('empty_strided', empty_strided, 'PrivateUse1')
LIBRARY.impl('_copy_from', copy_from, 'PrivateUse1')
