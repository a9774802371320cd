"""The inputs of a captured graph as data, and what is made from it: fake values on every node, seeded tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from fxq.calls.captured import put_off
from fxq.core.ir import example_value, get_tensor, inherit_meta
from fxq.core.signature import Sizes, hint_of
from fxq.dtypes import DTYPES, dtype_name
from fxq.export.files import BundleError
from fxq.export.graph.strict import DtypeName, Name, SchemaError, Shape, Size, Value
from fxq.runtime.ambient import own_tensors
from fxq.runtime.exclusive import exclusive
from fxq.runtime.reading import MAX_RANK

_MASK = 0xFFFFFFFF
_PIECE = 1 << 20
MAX_VALUES = 2**44
"""Most values of one input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputEntry:
    """One flat input of a captured graph.

    ``sizes`` holds a number, or a name where the size may vary (equal names, equal sizes); ``example`` the sizes it was
    captured with. ``dtype`` is torch's name, or None for an input that is no tensor: ``value`` then is its example.
    """

    name: Name
    dtype: DtypeName | None
    sizes: Annotated[tuple[Size | Name, ...], Field(max_length=MAX_RANK)] = ()
    example: Shape = ()
    value: Value = None


def check_entries(entries: Sequence[InputEntry]) -> None:
    """Check that sizes and example sizes of inputs from a file agree.

    Raises:
        SchemaError: naming the input.
    """
    named: dict[str, int] = {}
    for entry in entries:
        fits = len(entry.sizes) == len(entry.example) and (entry.dtype is not None or not entry.sizes)
        for size, example in zip(entry.sizes, entry.example, strict=False):
            fits = fits and example == (named.setdefault(size, example) if isinstance(size, str) else size)
        if not fits or (entry.dtype is not None and entry.value is not None):
            raise SchemaError(f"inputs: {entry.name} has sizes {entry.sizes}, examples {entry.example}")
        if math.prod(entry.example) > MAX_VALUES:
            raise SchemaError(f"inputs: {entry.name} has more than {MAX_VALUES} values")


def stand_ins(module: fx.GraphModule, entries: Sequence[InputEntry] | None, sizes: Sizes) -> list[object] | None:
    """Flat inputs without data, of the sizes a file states; None where it states no example.

    Args:
        module: the graph.
        entries: its inputs, or None (an older bundle).
        sizes: its inputs as the check of a call has them.

    Raises:
        BundleError: when the two differ, or a text is used by the graph.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    for node, want in zip(nodes, sizes, strict=True):
        if isinstance(want, dict) and isinstance(want.get("value"), str) and any(u.op != "output" for u in node.users):
            raise BundleError(f"input {node.name}: it is a text, and the graph computes with it")
    if entries is None:
        return None
    if len(entries) != len(nodes):
        raise BundleError(f"the manifest states {len(entries)} inputs, the graph has {len(nodes)}")
    for entry, node, want in zip(entries, nodes, sizes, strict=True):
        stated = None if entry.dtype is None else [None if isinstance(size, str) else size for size in entry.sizes]
        constant = {"value": entry.value}
        agree = want is None or want == stated if entry.dtype is not None else not isinstance(want, list)
        if isinstance(want, dict) and "value" in want:
            agree = agree and want == constant and type(want["value"]) is type(entry.value)
        if not agree or entry.name != node.name:
            raise BundleError(f"input {node.name}: facts.inputs says {want}, inputs says {entry.name} {stated}")
    return without_data(entries)


def without_data(entries: Sequence[InputEntry]) -> list[object]:
    """Flat inputs of the captured sizes on the meta device."""
    return [
        entry.value if entry.dtype is None else torch.empty(entry.example, dtype=_dtype(entry), device="meta")
        for entry in entries
    ]


def input_entries(module: fx.GraphModule) -> tuple[InputEntry, ...] | None:
    """The inputs as recorded on the graph; None where it carries no values (an older bundle)."""
    nodes = module.graph.find_nodes(op="placeholder")
    values = [example_value(node) for node in nodes]
    if any(value is None for value in values) and not any(isinstance(value, Tensor) for value in values):
        return None
    names: dict[str, str] = {}
    try:
        return tuple(_entry(node.name, value, names) for node, value in zip(nodes, values, strict=True))
    except ValueError:
        return None


def _entry(name: str, value: object, names: dict[str, str]) -> InputEntry:
    if isinstance(value, Tensor):
        return InputEntry(
            name=name,
            dtype=dtype_name(value.dtype),
            sizes=tuple(_size(size, names) for size in value.shape),
            example=tuple(hint_of(size) for size in value.shape),
        )
    if isinstance(value, torch.SymInt):
        return InputEntry(name=name, dtype=None, value=hint_of(value))
    return InputEntry(name=name, dtype=None, value=value if isinstance(value, int | float | bool | str) else None)


def _size(size: int | torch.SymInt, names: dict[str, str]) -> int | str:
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return names.setdefault(str(size), f"d{len(names)}") if fixed is None else fixed


def seeded_inputs(entries: Sequence[InputEntry], seed: int, device: torch.device) -> list[object]:
    """Flat inputs of the captured sizes, the same on every machine and torch version.

    Floats are uniform with mean 0 and variance 1, integers 0 (valid as an index), booleans True.
    """
    leaves: list[object] = []
    for position, entry in enumerate(entries):
        if entry.dtype is None:
            leaves.append(entry.value)
            continue
        dtype = _dtype(entry)
        if dtype.is_floating_point:
            values = torch.empty(entry.example, dtype=dtype)
            for start, part in pieces(values):
                part.copy_((noise(len(part), seed + position, start) - 0.5) * 12**0.5)
            leaves.append(values.to(device))
        else:
            leaves.append(torch.full(entry.example, dtype == torch.bool, dtype=dtype, device=device))
    return leaves


def _dtype(entry: InputEntry) -> torch.dtype:
    dtype = DTYPES.get(str(entry.dtype))
    if dtype is None:
        raise BundleError(f"input {entry.name}: {entry.dtype!r} is no dtype of torch; the bundle is damaged")
    return dtype


def noise(count: int, seed: int, start: int = 0) -> Tensor:
    """float64 [count] in 0..1 from an integer hash of position and seed: no generator, so no version dependence."""
    z = (torch.arange(start, start + count, dtype=torch.int64) + 1_000_003 * (seed + 1)) * 0x9E3779B1 & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        z = (z ^ (z >> shift)) * factor & _MASK
    return (z ^ (z >> 16)).double() / 2**32


def pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A contiguous tensor in flat parts of bounded size, with the position of each."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield start, flat[start : start + _PIECE]


@exclusive
def record_values(module: fx.GraphModule, entries: Sequence[InputEntry], device: torch.device) -> bool:
    """Record the fake value of every node, as tracing does; passes that run on a loaded graph read them.

    Returns:
        False, with no value recorded, when the graph cannot be run on fake values.
    """
    recording = _begin(module, entries, device)
    return recording is not None and recording.run(module)


@exclusive
def record_values_later(module: fx.GraphModule, entries: Sequence[InputEntry], device: torch.device) -> None:
    """Record the fake values of the inputs; those of the other nodes once the first of them is asked for.

    A graph that is only run never needs them, and making them takes most of the time of a load.
    """
    if (recording := _begin(module, entries, device)) is not None:
        put_off(module, recording.run)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recording:
    """Fake inputs of a graph, from which the values of its nodes follow."""

    mode: FakeTensorMode
    leaves: list[Any]

    def __deepcopy__(self, memo: object) -> _Recording:
        return self

    @exclusive
    @own_tensors()
    def run(self, module: fx.GraphModule) -> bool:
        """See :func:`record_values`; a copy of the graph will do as well."""
        # The Python dispatcher has the shape rules of operators that torch 2.11 cannot run on sizes that vary.
        with self.mode, enable_python_dispatcher():
            try:
                _Recorder(module, self.mode).run(*self.leaves, enable_io_processing=False)
            except Exception:  # whatever an operator's shape rule raises: the graph then runs without values
                for node in module.graph.nodes:
                    inherit_meta(node, node, None)
                return False
        return True


def _begin(module: fx.GraphModule, entries: Sequence[InputEntry], device: torch.device) -> _Recording | None:
    """Record the values of the inputs; None when they cannot be made."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    symbols: dict[str, object] = {}
    try:
        with mode, enable_python_dispatcher():
            leaves = [_fake(entry, shape_env, symbols, device) for entry in entries]
        for node, value in zip(module.graph.find_nodes(op="placeholder"), leaves, strict=True):
            inherit_meta(node, node, value)
    except BundleError:
        raise
    except Exception:  # sizes that torch makes no symbols of: the graph then runs without values
        return None
    return _Recording(mode, leaves)


class _Recorder(fx.Interpreter):
    """Runs the graph node by node and keeps each value on its node; weights become fake ones."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode

    def run_node(self, n: fx.Node) -> object:
        value = (
            self.mode.from_tensor(get_tensor(self.module, str(n.target)), static_shapes=True)
            if (n.op == "get_attr")
            else super().run_node(n)
        )
        if n.op != "output":
            inherit_meta(n, n, value)
        return value


def _fake(entry: InputEntry, shape_env: ShapeEnv, symbols: dict[str, Any], device: torch.device) -> Any:
    from torch._dynamo.source import ConstantSource  # Dynamo takes a second to import

    if entry.dtype is None:
        return entry.value
    sizes = []
    for size, example in zip(entry.sizes, entry.example, strict=True):
        if isinstance(size, str) and size not in symbols:
            source = ConstantSource(f"__{size}")
            symbol = shape_env.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
            symbols[size] = shape_env.create_symintnode(symbol, hint=example, source=source)
        sizes.append(symbols[size] if isinstance(size, str) else size)
    return torch.empty(sizes, dtype=_dtype(entry), device=device)


def call_flat(module: fx.GraphModule, leaves: Sequence[object]) -> list[Tensor]:
    """Call the module on flat inputs; the tensors of its result."""
    spec = module.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    with torch.no_grad():
        result = module(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
