"""Captures of the models of ``fxq.models`` and ``tests.toys``, made once a process: most tests quantize the same few.

``tests/capture`` captures anew, and whatever calls :func:`fxq.capture.trace.trace` itself takes no more than what
``torch.export`` made of a model of the same structure, with its own tensors.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import os

import torch
from torch.utils import _pytree as pytree

import fxq.capture.trace
import fxq.cli.quantize
import fxq.lab
import fxq.quantize
from fxq.calls.conditions import ConditionError
from fxq.capture.comparisons import _RECORDER, compared_sizes
from fxq.capture.guards import assumptions_of
from fxq.capture.trace import plain_model, trace

_KEPT, _KEPT_PROGRAMS = 10, 200
_OF_KNOWN_CODE = ("fxq.models.", "tests.toys")
_SIMPLE = (bool, int, float, str, tuple, type(None), torch.dtype)


def share():
    """Let :mod:`fxq.quantize` and what stands beside it take a copy of an equal model's capture."""
    known = collections.OrderedDict()

    @functools.wraps(trace)
    def shared(model, args, kwargs=None, dynamic_shapes=None, tolerance=1e-4, captured_with=None):
        key = _key(model, args, kwargs, dynamic_shapes, tolerance, captured_with)
        if key is None:
            return trace(model, args, kwargs, dynamic_shapes, tolerance, captured_with)
        if key not in known:
            known[key] = trace(model, args, kwargs, dynamic_shapes, tolerance, captured_with)
        known.move_to_end(key)
        while len(known) > _KEPT:
            known.popitem(last=False)
        return known[key].fork()

    for module in (fxq.quantize, fxq.lab, fxq.cli.quantize):
        module.trace = shared
    fxq.capture.trace._export = _export_once(fxq.capture.trace._export)
    fxq.capture.trace.assumptions_of = _of_first_use(fxq.capture.trace.assumptions_of)


def _of_first_use(assumptions_of):
    """What a program assumed when it was made: whoever computes with its sizes later adds to it."""

    @functools.wraps(assumptions_of)
    def once(program, compared, given):
        assumed = getattr(program, "_assumed", None)
        if assumed is None:
            return assumptions_of(program, compared, given)
        return dataclasses.replace(assumed, **{name: copy.copy(value) for name, value in vars(assumed).items()})

    return once


def _export_once(export):
    """The function that calls ``torch.export``, called once for all models of one known structure."""
    known = collections.OrderedDict()

    @functools.wraps(export)
    def once(model, args, kwargs, dynamic_shapes, strict):
        key = None
        if not os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/capture/"):
            key = _key(model, args, kwargs, dynamic_shapes, strict, torch.is_grad_enabled(), values=False)
        if key is None:
            return export(model, args, kwargs, dynamic_shapes, strict)
        recorder = _RECORDER.get()
        if key not in known:
            with compared_sizes() as compared:
                program = export(model, args, kwargs, dynamic_shapes, strict)
            kept = _with_tensors(program, {}, {}, None)
            try:
                kept._assumed = assumptions_of(program, None if strict else compared, given=False)
            except ConditionError:
                if recorder is not None:
                    recorder |= compared
                return program
            known[key] = kept
            while len(known) > _KEPT_PROGRAMS:
                known.popitem(last=False)
        program = known[key]
        known.move_to_end(key)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        constants = {name: buffers.get(name, value) for name, value in program.constants.items()}
        return _with_tensors(program, model.state_dict(keep_vars=True), constants, (args, kwargs))

    return once


def _with_tensors(program, state, constants, inputs):
    """The same program with other tensors."""
    found = copy.copy(program)
    found._state_dict, found._example_inputs = state, inputs
    found._constants = {**program.constants, **constants}
    return found


def _key(model, args, kwargs, *others, values=True):
    """Everything a capture depends on, but for ``values`` of tensors, or None where that is not known of the model."""
    if not isinstance(model, torch.nn.Module) or not type(model).__module__.startswith(_OF_KNOWN_CODE):
        return None
    digest = hashlib.sha256()
    for name, module in plain_model(model).named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        settings = {k: v for k, v in vars(module).items() if isinstance(v, _SIMPLE)}
        config = getattr(module, "config", None)
        digest.update(f"{name} {type(module)} {settings} {config!r}".encode())
    first = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return None
        tied = first.setdefault(id(tensor), name)
        digest.update(f"{name} {tied} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        if values:
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    leaves, form = pytree.tree_flatten((args, kwargs, others))
    told = [
        f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.requires_grad}" if isinstance(t, torch.Tensor) else repr(t)
        for t in leaves
    ]
    modes = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    text = f"{told} {form} {modes}"
    if " at 0x" in text:
        return None
    digest.update(text.encode())
    return digest.hexdigest()
