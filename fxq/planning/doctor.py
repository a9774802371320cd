"""What this machine can do: kernels per operator, each checked against its reference, and the gain to expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq import kernels, plugins
from fxq.export.interop import OTHER_TARGETS, TARGETS
from fxq.kernels import native
from fxq.kernels.arguments import Operands
from fxq.kernels.attention.eight_bits.int8_fp8 import IN_16_BITS
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm.op import IN_FLOAT, in_float_note, plain_weight
from fxq.kernels.gemm.panels import pack_panels
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import Arguments, Op
from fxq.models.families import SHIPPED_MODELS
from fxq.planning.environment import Environment, read_environment
from fxq.planning.gains import OLDEST_FP8, OLDEST_INT8, arch_name, cpu_gain, gpu_gain, no_gpu, no_triton
from fxq.plugins import Plugin
from fxq.recipes import METHODS
from fxq.runtime.messages import kind_and_line
from fxq.runtime.tables import Sheet

RARE = 0.01
"""Share of integers that may differ by one where they follow a float computation."""


@dataclass(frozen=True)
class Check:
    """An operator on a device.

    ``state`` is "ok", "wrong" (differs from the reference by more than its bound), "failed" (raised an error) or
    "unusable" (this hardware cannot run it: not an error). ``error`` is the largest difference found, relative to the
    largest reference value, integers in steps; ``note`` says why there is nothing faster, or what went wrong.
    """

    op: str
    device: str
    kernel: str
    state: str
    error: float | None
    note: str

    @property
    def healthy(self) -> bool:
        """Neither wrong nor failed."""
        return self.state in ("ok", "unusable")


@dataclass(frozen=True)
class Diagnosis:
    """The machine, its operators and the expected gain by device; prints as tables, :meth:`to_json` for programs.

    ``plugins`` are the installed ones, each with the reason why it cannot be used, or "".
    """

    environment: Environment
    checks: tuple[Check, ...]
    gains: tuple[tuple[str, str], ...]
    plugins: tuple[tuple[Plugin, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every operator that runs here is right."""
        return all(check.healthy for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return {
            "ok": self.ok,
            "environment": dataclasses.asdict(self.environment),
            "operators": [dataclasses.asdict(check) for check in self.checks],
            "expected_gain": dict(self.gains),
            "plugins": [dataclasses.asdict(plugin) | {"error": fault} for plugin, fault in self.plugins],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table(title="this machine", title_justify="left", show_header=False)
        for line in self.environment.lines():
            facts.add_row(*map(Text, line))
        yield facts
        names = ("operator", "device", "kernel", "state", "error")
        table = Sheet("operators, each against its reference", dict.fromkeys(names, "left"), "note")
        for check in self.checks:
            style = None if check.state == "ok" else "dim" if check.healthy else "bold red"
            error = "-" if check.error is None else f"{check.error:.1e}"
            table.add(check.op, check.device, check.kernel, check.state, error, note=check.note, style=style)
        yield table
        if self.plugins:
            yield self._plugin_table()
        for device, text in self.gains:
            yield Text(f"expected gain on {device}: {text}")
        bad = sum(not check.healthy for check in self.checks)
        yield Text(
            "every operator is right" if self.ok else f"{bad} operators are wrong: do not use them", style="bold"
        )

    def _plugin_table(self) -> Table:
        table = Table(title="plug-ins", title_justify="left")
        for name in ("group", "name", "distribution", "version", "state"):
            table.add_column(name, no_wrap=name != "state")
        for plugin, fault in self.plugins:
            cells = (plugin.group, plugin.name, plugin.distribution, plugin.version, fault or "ok")
            table.add_row(*map(Text, cells), style="bold red" if fault else None)
        return table


def diagnose() -> Diagnosis:
    """Look at this machine and run every operator on its samples on each device.

    Compiles the native kernels and imports every plug-in.
    """
    environment = read_environment()
    devices = ["cpu", *(f"cuda:{i}" for i in range(len(environment.devices)))]
    checks = [check for device in devices for op in kernels.OPS for check in check_op(op, device)]
    gains = [("cpu", cpu_gain())]
    gains += [(f"cuda:{i} ({gpu.name})", gpu_gain(gpu)) for i, gpu in enumerate(environment.devices)]
    if not environment.devices:
        reason = no_gpu()
        checks += [
            Check(op.name, "cuda", kernels.used(op.name, "cuda"), "unusable", None, reason) for op in kernels.OPS
        ]
        gains.append(("a GPU", f"none, because {reason}"))
    return Diagnosis(environment, tuple(checks), tuple(gains), tuple(check_plugins()))


def check_plugins() -> Iterator[tuple[Plugin, str]]:
    """Every installed plug-in with the reason why it cannot be used, or ""; imports them."""
    shipped: dict[str, tuple[str, ...]] = {
        plugins.METHODS: tuple(METHODS),
        plugins.EXPORTS: (*TARGETS, *OTHER_TARGETS),
        plugins.MODELS: SHIPPED_MODELS,
        plugins.METRICS: (),
    }
    for group, names in shipped.items():
        for plugin in plugins.plugins(group):
            yield plugin, plugins.fault_of(plugin, names)


def check_op(op: Op, device: str) -> Iterator[Check]:
    """An operator on a device, a linear on a CPU once per layout of its weight.

    Args:
        op: one of :data:`fxq.kernels.OPS`.
        device: "cpu", or as "cuda:0".
    """
    kernel = kernels.used(op.name, device)
    if reason := _unusable(op, device):
        yield Check(op.name, device, "-", "unusable", None, reason)
        return
    portable = [arguments for arguments in op.samples() if not _has_panels(arguments)]
    yield _check(op, device, kernel, portable, why_slow(op, device))
    if _is_linear(op) and device == "cpu":
        if native.ready():
            laid_out = [_with_panels(op, arguments) for arguments in portable]
            yield _check(op, device, native.name(), laid_out, "weights laid out by fxq.optimize")
        else:
            yield Check(op.name, device, native.name(), "unusable", None, native.why_not())


def _is_linear(op: Op) -> bool:
    return op.name.startswith("dual_scale_linear") and op not in kernels.FLOAT8


def _has_panels(arguments: Arguments) -> bool:
    return any(isinstance(a, Tensor) and a.ndim == 4 and not a.is_floating_point() for a in arguments)


def _with_panels(op: Op, arguments: Arguments) -> Arguments:
    names = [argument.name for argument in op.definition._schema.arguments]  # type: ignore[attr-defined]
    values = dict(zip(names, arguments, strict=True))
    operands = Operands(**{name: values[name] for name in Operands._fields})
    return tuple((values | {"weight": pack_panels(plain_weight(operands), operands.split, operands.bits)}).values())


def _unusable(op: Op, device: str) -> str:
    if device == "cpu" or not HAS_TRITON:
        return ""
    capability = torch.cuda.get_device_capability(device)
    needs = OLDEST_FP8 if op in kernels.FLOAT8 else OLDEST_INT8
    if kernels.used(op.name, device).startswith(("triton", "none")) and capability < needs:
        return f"needs {arch_name(needs)}, this GPU is {arch_name(capability)}"
    return ""


def why_slow(op: Op, device: str) -> str:
    """Why an operator has nothing faster than what runs on a device, or ""."""
    kernel = kernels.used(op.name, device)
    if kernel in ("triton", native.name()):
        return ""
    if kernel == IN_16_BITS:
        return "this GPU has no FP8 products"
    if device != "cpu":
        return no_triton() or "torch's own kernels serve it"
    if _is_linear(op):
        return in_float_note() if kernel == IN_FLOAT else ""
    if kernel == fp8.ON_CPU:
        return "a CPU has no FP8 arithmetic: no faster than float"
    if kernel == "reference":
        return "no CPU kernel is written for it"
    return native.why_not() or f"the {native.name()} kernels have none for it"


def _check(op: Op, device: str, kernel: str, samples: list[Arguments], note: str) -> Check:
    worst = 0.0
    for arguments in samples:
        want = pytree.tree_leaves(op.reference(*arguments))
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
        try:
            got = [tensor.cpu() for tensor in pytree.tree_leaves(op(*moved))]
        except Exception as error:  # whatever a compiler or a driver raises is the finding
            return Check(op.name, device, kernel, "failed", None, kind_and_line(error))
        for one, wanted in zip(got, want, strict=True):
            if fault := disagreement(op, one, wanted):
                return Check(op.name, device, kernel, "wrong", None, fault)
            worst = max(worst, _largest(one, wanted))
    return Check(op.name, device, kernel, "ok", worst, note)


def disagreement(op: Op, got: Tensor, want: Tensor) -> str:
    """What is wrong with a result, or "".

    Floats may differ by the operator's bound, relative to the largest reference value. Integers are equal; where they
    follow a float computation, few may differ, by one.
    """
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"returns {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    error = _largest(got, want)
    integers = want.dtype == torch.int8
    bound = 1.0 if integers and op.max_error else op.max_error
    if not error <= bound:
        return f"differs by {error:.3g}, expected at most {bound:.3g}"
    share = float((got != want).double().mean()) if integers and want.numel() else 0.0
    return f"{share:.1%} of the integers differ, expected at most {RARE:.0%}" if share > RARE else ""


def _largest(got: Tensor, want: Tensor) -> float:
    """Largest difference: of integers in steps, of floats relative to the largest reference value."""
    if not want.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max()
    scale = 1.0 if want.dtype == torch.int8 else max(float(want.double().abs().max()), torch.finfo(torch.float32).tiny)
    return float(error) / scale
