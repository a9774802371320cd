"""The callable of a program compiled ahead of time: machine code reads memory unasked, so its calls are checked.

They are checked against data in ``program.json``: the arguments' names, the sizes, dtypes and conditions of
:class:`fxq.calls.rules.CallRules`, the kind of device of every input, and which inputs the graph writes to.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxq.calls.captured import convention, rules_of
from fxq.calls.rules import CallRules, InputError, bind, flatten
from fxq.core.aliasing import written_inputs
from fxq.core.ir import example_value
from fxq.core.signature import call_rules
from fxq.export.capture import ExportError
from fxq.passes.match.cache_inputs import TakesCache

KEY = "call"


def call_facts(module: fx.GraphModule) -> dict[str, object]:
    """What ``program.json`` states of a quantized module's calls."""
    rules = rules_of(module) or call_rules(module)
    nodes = module.graph.find_nodes(op="placeholder")
    values = [example_value(node) for node in nodes]
    touched = written_inputs(module.graph)
    return {
        "arguments": convention(module)[0],
        "names": list(rules.names),
        "devices": [value.device.type if isinstance(value, Tensor) else None for value in values],
        "written": [i for i, node in enumerate(nodes) if node in touched],
    } | rules.to_json()


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """Runs compiled code on the calls that it was compiled for.

    ``run`` takes the arguments in the structure ``spec``; tensors must be dense, so others are copied first and, where
    the graph writes to them, copied back. ``takes_cache`` is what rollouts read.
    """

    run: Callable[..., object]
    spec: pytree.TreeSpec
    arguments: tuple[str, ...]
    rules: CallRules
    devices: tuple[str | None, ...]
    written: tuple[int, ...]
    takes_cache: TakesCache = dataclasses.field(default_factory=TakesCache)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """The result for the module's arguments.

        Raises:
            InputError: when the call is not one that the program was compiled for.
        """
        leaves: list[Any] = list(flatten(*bind(self.arguments, self.spec, args, kwargs), self.spec))
        self.rules.check(leaves)
        given = list(leaves)
        for i, (leaf, device) in enumerate(zip(leaves, self.devices, strict=True)):
            if not isinstance(leaf, Tensor):
                continue
            if device is not None and leaf.device.type != device:
                name = self.rules.names[i]
                raise InputError(
                    f"input {name} is on {leaf.device}, the program was compiled for {device}; move it there"
                )
            leaves[i] = leaf.detach().resolve_conj().resolve_neg().contiguous()
        call_args, call_kwargs = pytree.tree_unflatten(leaves, self.spec)
        result = self.run(*call_args, **call_kwargs)
        for i in self.written:
            if leaves[i].data_ptr() != given[i].data_ptr():
                given[i].copy_(leaves[i])
        return result


def compiled_program(run: Any, facts: Mapping[str, Any], where: str) -> CompiledProgram:
    """The callable of a loaded package.

    Args:
        run: of ``torch._inductor.package.load_package``.
        facts: of ``program.json``, which a file brings.
        where: the folder, for messages.

    Raises:
        ExportError: when what it states of calls is damaged.
    """
    spec = pytree.treespec_loads(run.loader.get_call_spec()[0])
    stated = facts.get(KEY)
    if stated is None:
        warnings.warn(
            f"{where} was exported before programs stated their inputs: calls that do not fit are not noticed and read "
            "memory that is not theirs. Export it again",
            stacklevel=4,
        )
        return _unchecked(run, spec)
    try:
        return _read(run, spec, stated)
    except (TypeError, KeyError, ValueError) as error:
        raise ExportError(f"{where}: what it states of its calls is damaged ({error}); export it again") from error


def _read(run: Any, spec: pytree.TreeSpec, stated: Mapping[str, Any]) -> CompiledProgram:
    names, arguments = stated["names"], stated["arguments"]
    devices, written, count = stated["devices"], stated["written"], spec.num_leaves
    for found in (names, arguments):
        if not isinstance(found, list) or not all(isinstance(name, str) and name.isidentifier() for name in found):
            raise ValueError(f"{str(found)[:80]} are no names")
    if not isinstance(devices, list) or not all(d is None or isinstance(d, str) for d in devices):
        raise ValueError(f"{str(devices)[:80]} are no devices")
    if not isinstance(written, list) or not all(type(i) is int and 0 <= i < count for i in written):
        raise ValueError(f"{str(written)[:80]} are no positions of inputs")
    if not len(names) == len(devices) == count or len(arguments) != sum(spec.child(i).num_children for i in range(2)):
        raise ValueError(f"it states {len(names)} inputs, the program has {count}")
    rules = CallRules.from_json(stated, names)
    if any(not isinstance(rules.sizes[i], list) for i in written):
        raise ValueError("it writes to an input that is no tensor")
    return CompiledProgram(run, spec, tuple(arguments), rules, tuple(devices), tuple(written))


def _unchecked(run: Any, spec: pytree.TreeSpec) -> CompiledProgram:
    """A program of which only the number of arguments is known."""
    count = spec.num_leaves
    names = tuple(f"input_{i}" for i in range(count))
    args, kwargs = spec.child(0).num_children, spec.child(1).context or ()
    arguments = (*(f"argument_{i}" for i in range(args)), *kwargs)
    rules = CallRules(names, [None] * count, (None,) * count)
    return CompiledProgram(run, spec, arguments, rules, (None,) * count, ())
