"""Capture with torch.export: one graph of ATen ops, compared with eager on the example."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxq.calls.captured import convention, guard_calls
from fxq.calls.conditions import ConditionError
from fxq.capture.comparisons import compared_sizes
from fxq.capture.dense_masks import dense_masks
from fxq.capture.guards import Assumptions, assumptions_of
from fxq.capture.names import unsayable_name
from fxq.capture.regions import complex_as_real, inline_regions, without_autocast
from fxq.capture.small_sizes import final_conditions
from fxq.core.aliasing import read_around_writes, told
from fxq.core.interpret import SparingInterpreter, sparing
from fxq.core.ir import QuantGraph, Stage, get_tensor, module_path
from fxq.core.places import DataAccesses, place_of, quoted_place
from fxq.core.signature import call_rules, flatten_call
from fxq.runtime.exclusive import exclusive, quiet
from fxq.runtime.memory.offload import absent_weights
from fxq.runtime.messages import first_line

if TYPE_CHECKING:
    import sympy

_REMEDIES = {  # by the higher-order operator whose body is a graph of its own
    "cond": "choose the branch outside the model, so that one call has one path",
    "flex_attention": "use another attention backend: its mask is a function, which no graph can hold as a tensor",
    "flat_apply": "use another attention backend: its mask is a function, which no graph can hold as a tensor",
}
_ADVICE = (
    "Make the forward free of data-dependent Python branches and in-place cache writes, or pass an ExportedProgram"
)
_ADVISERS = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


class TraceError(RuntimeError):
    """A model that cannot be captured, or whose graph does not compute what the model does."""


def plain_model(model: nn.Module) -> nn.Module:
    """The model behind ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``, with its own names."""
    while True:
        inner: object = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@exclusive
def trace(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    args: tuple[object, ...],
    kwargs: dict[str, object] | None = None,
    dynamic_shapes: object = None,
    tolerance: float = 1e-4,
    captured_with: tuple[tuple[object, ...], dict[str, object]] | None = None,
) -> QuantGraph:
    """Capture ``model`` at training IR (``aten.linear`` kept) without changing it.

    Both forms of ``torch.export`` are tried, first by running the forward, then by reading its bytecode; the graph that
    computes what eager does is taken.

    Args:
        model: a module, a GraphModule or an ExportedProgram (taken as it is); wrappers of a module are seen through.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as for ``torch.export.export``.
        tolerance: largest allowed ``max |graph - eager| / max |eager|`` on the example.
        captured_with: inputs (args, kwargs) of other sizes to capture with; only their sizes and dtypes are looked at.

    Returns:
        A TRACED graph whose tensors share storage with the model's.

    Raises:
        TraceError: when export fails or the outputs differ; the message has the reason and the place.
    """
    kwargs = kwargs or {}
    if isinstance(model, ExportedProgram):
        graph = _captured(model)
        _run_unchanged(graph.module, args, kwargs)
        return _guarded(graph, _assumed(model, None, given=True), args, kwargs, None, tolerance)
    eager, errors = plain_model(model), list[TraceError]()
    if reason := absent_weights(eager) or unsayable_name(eager):
        raise TraceError(f"{type(eager).__name__} cannot be captured: {reason}")
    # Called before capture: what a forward makes once and keeps would be kept from the capture, without values.
    want = _eager(eager, args, kwargs)
    for strict in (False, True):
        try:
            with compared_sizes() as compared:
                program = _export(eager, *(captured_with or (args, kwargs)), dynamic_shapes, strict)
            graph = _captured(program)
            _compare(_run_unchanged(graph.module, args, kwargs, _mode(eager)), want, tolerance, _mode(eager))
            assumed = _assumed(
                program, None if strict else compared, given=False
            )  # Bytecode is read, not run: nothing is compared.
            return _guarded(graph, assumed, args, kwargs, eager, tolerance)
        except TraceError as error:
            errors.append(error)
    raise TraceError(_reasons(eager, args, kwargs, errors)) from errors[0]


def _export(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], dynamic_shapes: Any, strict: bool
) -> ExportedProgram:
    try:
        # torch prints the graph of a failure to stderr, and logs which dimensions it fixed: the quantized module
        # itself refuses calls of other sizes.
        with torch.no_grad(), quiet(*_ADVISERS):
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
    except OSError:  # of the machine, not of the model
        raise
    except Exception as error:
        raise TraceError(f"torch.export cannot capture {type(model).__name__}: {_briefly(error)}. {_ADVICE}") from error


def _briefly(error: BaseException) -> str:
    """First line of an error and the place in the model's code where it arose."""
    line = first_line(error).rstrip(".")
    return f"{line}, at {found}" if (found := place_of(error)) else line


def _eager(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> list[object]:
    """Leaves of what the model returns."""
    inputs, options = copy.deepcopy((args, kwargs))
    try:
        with torch.no_grad(), _buffers_put_back(model), sparing(model):
            return pytree.tree_leaves(model(*inputs, **options))
    except Exception as error:
        raise TraceError(
            f"torch.export cannot capture {type(model).__name__}: it does not run on the example inputs: "
            f"{_briefly(error)}. Pass inputs that the model can be called with"
        ) from error


def _reasons(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], errors: list[TraceError]) -> str:
    """Why neither form of capture served, and where writes may have been lost."""
    first, second = (str(error) for error in errors)
    text = first if _cause(errors[0]) == _cause(errors[1]) else f"{first}. Captured from bytecode: {second}"
    with DataAccesses() as accesses:
        _eager(model, args, kwargs)
    if accesses.places:
        text += f". A write through .data is lost in capture: {', '.join(accesses.places[:4])}"
    return text


def _cause(error: TraceError) -> str:
    """The place of a failed export, by which two failures are the same, else the message."""
    return ("" if error.__cause__ is None else place_of(error.__cause__)) or str(error)


def _mode(model: nn.Module) -> str:
    return " The model is in training mode; call .eval() first." if model.training else ""


def _captured(program: ExportedProgram) -> QuantGraph:
    """The program's graph in the form that passes work on."""
    module = _inlined(without_autocast(program))
    if around := read_around_writes(module.graph):
        module = _inlined(_without_writes(program, around))
    if left := read_around_writes(module.graph):
        raise TraceError(
            f"{told(left)}, so that what is read is not one value: write the result to a tensor of its own in the model"
        )
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS:
            module.graph.erase_node(node)
    dense_masks(module)
    module.graph.eliminate_dead_code()
    _refuse_regions(module)
    complex_as_real(module)
    module.recompile()
    return QuantGraph(module, Stage.TRACED).fork()


def _without_writes(program: ExportedProgram, around: list[tuple[fx.Node, fx.Node]]) -> ExportedProgram:
    """The program with a tensor of its own for what each write in place makes."""
    try:
        with torch.no_grad():
            return program.run_decompositions({})
    except Exception as error:
        raise TraceError(f"{told(around)}, and torch cannot undo that: {_briefly(error)}") from error


def _inlined(program: ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    return module


def _assumed(program: ExportedProgram, compared: set[sympy.Symbol] | None, given: bool) -> Assumptions:
    try:
        return assumptions_of(program, compared, given)
    except ConditionError as error:
        raise TraceError(
            f"the capture depends on sizes in a way that calls cannot be checked for: {error}. Pass dynamic_shapes "
            "that fix these sizes"
        ) from error


def _guarded(
    graph: QuantGraph,
    assumed: Assumptions,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    model: nn.Module | None,
    tolerance: float,
) -> QuantGraph:
    """The graph whose module refuses calls that the capture does not hold for."""
    module = graph.module
    _, spec = convention(module)

    def agrees(leaves: list[object]) -> bool:
        call_args, call_kwargs = pytree.tree_unflatten(leaves, spec)
        return model is not None and _agrees(model, module, call_args, call_kwargs, tolerance)

    conditions = final_conditions(assumed, flatten_call(module, args, kwargs), agrees)
    graph.module = guard_calls(module, call_rules(module, conditions))
    return graph


def _agrees(
    model: nn.Module, module: fx.GraphModule, args: tuple[object, ...], kwargs: dict[str, object], tolerance: float
) -> bool:
    """Whether the model can be called so, and the graph computes the same."""
    try:
        _compare(_run_unchanged(module, args, kwargs), _eager(model, args, kwargs), tolerance, "")
    except TraceError:
        return False
    return True


def _refuse_regions(module: fx.GraphModule) -> None:
    """Linears inside submodules would stay unseen and nothing downstream could write them; no more a fake tensor."""
    for node in module.graph.find_nodes(op="get_attr"):
        user = next(iter(node.users), node)
        where = f" at {found}" if (found := quoted_place(user.stack_trace or "")) else ""
        try:
            tensor = get_tensor(module, str(node.target))
        except TypeError as error:
            name = str(user.target).rpartition(".")[2]
            inside = f" in {path}" if (path := module_path(user)) else ""
            remedy = _REMEDIES.get(name, "keep it outside the model that is quantized")
            raise TraceError(
                f"the captured graph has a region {name} ({user.name}{inside}){where}: {remedy} ({error})"
            ) from None
        if isinstance(tensor, FakeTensor):
            raise TraceError(f"the captured graph has a tensor without values, {node.target}, used{where}")


def _compare(got: list[object], want: list[object], tolerance: float, mode: str) -> None:
    if len(got) != len(want):
        raise TraceError(f"the captured graph returns {len(got)} values, the model {len(want)}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            _compare_output(i, a, b, tolerance, mode)


def _run_unchanged(
    module: fx.GraphModule, args: tuple[object, ...], kwargs: dict[str, object], mode: str = ""
) -> list[object]:
    """Leaves of the graph's output; a graph that writes to the model's buffers is refused."""
    inputs, options = copy.deepcopy((args, kwargs))
    with torch.no_grad(), _buffers_put_back(module) as written:
        try:
            got = pytree.tree_leaves(SparingInterpreter(module).call(*flatten_call(module, inputs, options)))
        except Exception as error:
            raise TraceError(f"the captured graph does not run on the example inputs: {_briefly(error)}") from error
    if written:
        raise TraceError(
            f"the forward writes to buffer {', '.join(written[:4])}: a call would change the model.{mode} "
            "Make caches inputs and outputs of the forward"
        )
    return got


@contextlib.contextmanager
def _buffers_put_back(module: nn.Module) -> Iterator[list[str]]:
    """Give buffers that the block changed their old values; their names are in the list afterwards."""
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    written: list[str] = []
    try:
        yield written
    finally:
        written += [n for n, (now, old) in buffers.items() if not torch.allclose(now, old, 0, 0, equal_nan=True)]
        for name in written:
            buffers[name][0].copy_(buffers[name][1])


def _compare_output(i: int, a: Tensor, b: Tensor, tolerance: float, mode: str) -> None:
    if a.shape != b.shape:
        raise TraceError(f"output {i}: the captured graph returns shape {tuple(a.shape)}, eager {tuple(b.shape)}")
    if not a.numel():
        return
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    scale, error = b.nan_to_num(0, 0, 0).abs().max().item(), torch.where(same, 0.0, (a - b).abs()).max().item()
    if error:
        error = error / scale if scale else float("inf")
    if not error <= tolerance:
        raise TraceError(
            f"output {i}: the captured graph differs from eager by {error:.2e} relative, allowed {tolerance:.0e}."
            f"{mode} Hidden state or randomness in forward is the usual cause"
        )
