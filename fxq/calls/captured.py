"""The module of a captured graph: it refuses calls it was not captured for, and stays itself in copies and pickles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxq.calls.fixed_dtypes import FixedDtypes
from fxq.calls.rules import CallRules, bind
from fxq.runtime.exclusive import exclusive

_FLAT = "_fxq_flat"
_LATER = "fxq_later"


class CheckedCalls(_PyTreeCodeGen):
    """Calling convention of a graph whose calls are checked.

    The check stands in the generated ``forward`` in place of the plain flattening of arguments, so whatever is made
    from the graph keeps it: copies, compiled and exported forms. A graph interpreted on nested inputs is checked too.
    """

    def __init__(self, info: _PyTreeInfo, rules: CallRules) -> None:
        super().__init__(_PyTreeInfo([name for name in info.orig_args if name != "self"], info.in_spec, info.out_spec))
        self.rules = rules

    def additional_globals(self) -> list[tuple[str, object]]:
        """The check, under the name that the generated code calls it by."""
        return [*super().additional_globals(), (_FLAT, self.rules.flat)]

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        """The line that turns arguments into flat inputs."""
        info = self.pytree_info
        count = info.in_spec.child(0).num_children
        args = "".join(f"{name}, " for name in info.orig_args[:count])
        keys = info.in_spec.child(1).context or ()
        kwargs = ", ".join(f"{key!r}: {name}" for key, name in zip(keys, info.orig_args[count:], strict=True))
        inputs = [name.split(":")[0].split("#")[0] for name in free_vars if name != "self"]
        if len(inputs) == len(info.orig_args) and _is_flat(info.in_spec):
            return f"\n    {', '.join(inputs)}, = {_FLAT}(({', '.join(info.orig_args)},), None, None)"
        return f"\n    {', '.join(inputs)}, = {_FLAT}(({args}), {{{kwargs}}}, self._in_spec)"

    def process_inputs(self, *inputs: object) -> object:
        """Flat inputs, checked, of a graph that is interpreted."""
        leaves = super().process_inputs(*inputs)
        if len(leaves) == len(self.rules.names):
            self.rules.check(leaves)
        return leaves


def _is_flat(spec: pytree.TreeSpec) -> bool:
    """Whether no argument is nested."""
    return all(spec.child(i).num_nodes == 1 + spec.child(i).num_children for i in range(2))


class CapturedModule(FixedDtypes, fx.GraphModule):
    """A GraphModule that says which arguments it was captured with, and that copies and pickles carry whole."""

    reducer: ClassVar[Callable[[CapturedModule], tuple[object, ...]] | None] = None
    """Set by :mod:`fxq.export.pickled`, which writes values as bundles do."""

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the graph.

        Raises:
            fxq.calls.rules.InputError: when the call is not one that the graph was captured for.
        """
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            bind(*convention(self), args, kwargs)
            raise

    def __copy__(self) -> CapturedModule:
        copied = CapturedModule(self, self.graph, type(self).__name__)
        inherit_notes(copied, notes_of(self))
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        assert CapturedModule.reducer is not None
        return CapturedModule.reducer(self)


def notes_of(module: fx.GraphModule) -> dict[str, Any]:
    """What libraries noted on a module as a whole: facts of fxq, and others'."""
    return dict(getattr(module, "meta", None) or {})


def inherit_notes(new: fx.GraphModule, notes: Mapping[str, object]) -> None:
    """Give a copy of a module the notes of its original."""
    new.meta.update(notes)


def put_off(module: fx.GraphModule, work: Callable[[fx.GraphModule], object]) -> None:
    """Note work on a module's nodes that :func:`catch_up` does once it is needed; copies of the graph take it over."""
    module.meta[_LATER] = work


def catch_up(module: fx.GraphModule) -> None:
    """Do what was put off."""
    work = module.meta.pop(_LATER, None) if hasattr(module, "meta") else None
    if work is not None:
        work(module)


def lasting_notes(module: fx.GraphModule) -> dict[str, Any]:
    """The notes that another process can read: work that was put off is not among them."""
    return {name: note for name, note in notes_of(module).items() if name != _LATER}


def convention(module: fx.GraphModule) -> tuple[list[str], pytree.TreeSpec]:
    """Names of a captured call's arguments, and the structure of (args, kwargs)."""
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return [name for name in info.orig_args if name != "self"], info.in_spec


def set_convention(
    module: fx.GraphModule,
    names: Sequence[str],
    spec: pytree.TreeSpec,
    rules: CallRules,
    results: pytree.TreeSpec | None = None,
) -> None:
    """Give a graph whose inputs, or results, were changed other ones; the module has to be compiled again."""
    out_spec = results or module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    module.graph.set_codegen(CheckedCalls(_PyTreeInfo(list(names), spec, out_spec), rules))


def rules_of(module: fx.GraphModule) -> CallRules | None:
    """What a module's calls are checked against, or None."""
    codegen = module.graph._codegen
    return codegen.rules if isinstance(codegen, CheckedCalls) else None


@exclusive
def guard_calls(module: fx.GraphModule, rules: CallRules) -> CapturedModule:
    """The module, whose calls are checked from now on; a plain GraphModule becomes one that shares its tensors."""
    codegen = module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    module.graph.set_codegen(CheckedCalls(codegen.pytree_info, rules))
    if not isinstance(module, CapturedModule):
        captured = CapturedModule(module, module.graph, type(module).__name__)
        inherit_notes(captured, notes_of(module))
        return captured
    module.recompile()
    return module
