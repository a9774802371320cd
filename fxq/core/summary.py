"""What happened to every linear, read off a quantized module."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import fx

from fxq import kernels
from fxq.core.facts import ChosenAttentions, Facts, Texts
from fxq.core.graph import arguments, linear_sites
from fxq.core.ir import LayerPlan, get_tensor, plan_of, planned
from fxq.core.layer import QuantizedLayer
from fxq.core.products import TRANSFORM_TENSORS, OtherProduct, other_products
from fxq.kernels.attention.codecs import codecs_of
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm import op as gemm
from fxq.runtime.streams import as_text
from fxq.runtime.tables import Justify, Sheet, grouped

_COLUMNS: dict[str, Justify] = {
    "layer": "left",
    "bits": "left",
    "shape": "right",
    "outliers": "right",
    "output SQNR dB": "right",
}
_OTHER = "matrix product that is no linear"


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One linear: quantized or why not, bits, outliers, output SQNR in dB, bytes stored and the kernel that runs.

    ``output_sqnr`` is that of the layer's output, bias included, over all calibration data, with exact inputs; None
    where nothing was measured. A matrix product that is no linear but reads a stored tensor has a row of its own.
    ``remarks`` say what :func:`fxq.optimize` did with it, or why it could not; the ``reason`` of a quantized layer is
    why a budget gave it its bits. ``transform`` names what the graph does to its input or adds to its output; tensors
    for it that lie under the layer's name are in ``bytes``.
    """

    layer: str
    quantized: bool
    reason: str
    bits: str
    shape: tuple[int, int]
    outliers: int
    output_sqnr: float | None
    bytes: int
    bf16_bytes: int
    kernel: str
    remarks: tuple[str, ...] = ()
    transform: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Every linear of a module with totals; prints as a table, :meth:`to_json` for programs.

    ``facts`` are the module's :class:`~fxq.core.facts.Facts` in JSON form, ``notes`` what is said of modules;
    ``attention_kernel`` runs attentions in integers, empty where there are none.
    """

    rows: tuple[LayerRow, ...]
    facts: dict[str, object]
    notes: Texts = dataclasses.field(default_factory=dict)
    attention_kernel: str = ""

    @property
    def quantized(self) -> tuple[LayerRow, ...]:
        """Rows of quantized layers."""
        return tuple(row for row in self.rows if row.quantized)

    @property
    def kept(self) -> tuple[LayerRow, ...]:
        """Rows of layers in model dtype, products that are no linear among them."""
        return tuple(row for row in self.rows if not row.quantized)

    @property
    def others(self) -> tuple[LayerRow, ...]:
        """Rows of matrix products that are no linear."""
        return tuple(row for row in self.rows if row.reason.startswith(_OTHER))

    @property
    def ratio(self) -> float:
        """Bytes of the quantized linears (scales, permutations and offsets included) over their size in bf16."""
        size = sum(row.bf16_bytes for row in self.quantized)
        return sum(row.bytes for row in self.quantized) / size if size else 1.0

    def to_json(self) -> str:
        """JSON text with totals, facts and one object per layer."""
        return json.dumps(
            {
                "quantized": len(self.quantized),
                "kept": len(self.kept) - len(self.others),
                "other_products": len(self.others),
                "size_ratio_to_bf16": self.ratio,
                "attention_kernel": self.attention_kernel,
                "facts": self.facts,
                "layers": [dataclasses.asdict(row) for row in self.rows],
            },
            indent=1,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        others = len(self.others)
        counts = f"{len(self.quantized)} linears quantized, {len(self.kept) - others} kept"
        counts += f", {others} other product{'s' * (others > 1)}" if others else ""
        sheet = Sheet(f"{counts}, {self.ratio:.3f}x of bf16", _COLUMNS, "kernel or reason")
        for row in self.rows:
            said = (row.kernel, row.transform, row.reason, *row.remarks) if row.quantized else (row.reason,)
            sheet.add(
                row.layer,
                row.bits,
                f"{row.shape[0]}x{row.shape[1]}",
                str(row.outliers or "-"),
                "-" if row.output_sqnr is None else f"{row.output_sqnr:.1f}",
                note="; ".join(filter(None, said)),
                style=None if row.quantized else "dim",
            )
        yield sheet
        if chosen := ChosenAttentions.of(self.facts):
            yield Text("\n".join(chosen.lines(self.attention_kernel)))
        if notes := self._notes():
            yield Text(notes)
        if any(row.kernel == gemm.IN_FLOAT for row in self.rows):
            yield Text(gemm.in_float_note())
        if any(row.kernel == fp8.ON_CPU for row in self.rows):
            yield Text(fp8.NOTE)

    def _notes(self) -> str:
        """Each sentence about modules once, with the modules it is said of."""
        return grouped((place, text) for place, texts in self.notes.items() for text in texts)

    def __str__(self) -> str:
        return as_text(self)


def _row(module: fx.GraphModule, plan: LayerPlan, node: fx.Node, remarks: Texts) -> LayerRow:
    layer = None if plan.scheme is None else QuantizedLayer.of(node)
    return LayerRow(
        layer=plan.layer,
        quantized=layer is not None,
        reason=plan.reason,
        bits=plan.scheme.detail if plan.scheme else "-",
        shape=(plan.out_features, plan.in_features),
        outliers=len(plan.outliers),
        output_sqnr=plan.output_sqnr,
        bytes=0 if layer is None else _stored_bytes(module, layer),
        bf16_bytes=2 * plan.out_features * (plan.in_features + 1),
        kernel="" if layer is None else _kernel(module, layer),
        remarks=tuple(remarks.get(plan.layer, ())),
        transform=plan.transform,
    )


def _other(product: OtherProduct) -> LayerRow:
    reason = f"{_OTHER}: {product.operator}"
    return LayerRow(product.layer, False, reason, "-", product.shape, 0, None, 0, 2 * product.size, "")


def _kernel(module: fx.GraphModule, layer: QuantizedLayer) -> str:
    weight = get_tensor(module, str(layer.weight.target))
    return kernels.used(str(layer.product.target).removeprefix("fxq."), str(weight.device), weight)


def _stored_bytes(module: fx.GraphModule, layer: QuantizedLayer) -> int:
    """Bytes of what the layer reads; of a product that several layers share, the part of its rows.

    A weight of fewer bits than its integers counts as files hold it.
    """
    operands, rows = layer.operands(module), layer.plan.out_features
    outputs, narrow = max(1, len(operands["offset"])), layer.scheme.is_narrow
    read = [t for name, t in operands.items() if not (narrow and name == "weight")]
    joint = sum(t.numel() * t.element_size() for t in read) * rows // outputs
    joint += layer.scheme.weight_bytes(rows, layer.plan.in_features) if narrow else 0
    buffers = dict(module.named_buffers(remove_duplicate=False))
    own = [buffers.get(f"{layer.name}.{name}") for name in ("perm", "input_zero_point")]
    own += [buffers[name] for name in _added(buffers, layer.plan)]
    return joint + sum(t.numel() * t.element_size() for t in own if t is not None)


def _added(buffers: Collection[str], plan: LayerPlan) -> list[str]:
    """Names of the tensors of a layer's transforms."""
    names = (f"{plan.layer}.{name}" for name in TRANSFORM_TENSORS) if plan.transform else ()
    return [name for name in names if name in buffers]


def summary(module: fx.GraphModule) -> Summary:
    """Summarise a module made by :func:`fxq.quantize` or :func:`fxq.load`.

    Raises:
        ValueError: when the module carries no fxq facts.
    """
    facts = Facts.of(module)
    rows = [_row(module, plan, nodes[0], facts.remarks) for plan, nodes in planned(module).values()]
    known = {row.layer for row in rows}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    known |= {name for plan, _ in planned(module).values() for name in _added(buffers, plan)}
    for site in linear_sites(module):
        if plan_of(site.node) is None and site.layer not in known:
            rows.append(LayerRow(site.layer, False, "not planned", "-", (0, 0), 0, None, 0, 0, ""))
    rows += [_other(product) for product in other_products(module) if product.layer not in known]
    for layer in facts.never_called:
        rows.append(LayerRow(layer, False, "never called in the captured graph", "-", (0, 0), 0, None, 0, 0, ""))
    return Summary(tuple(rows), facts.to_json(), facts.notes, _attention_kernel(module))


def _attention_kernel(module: fx.GraphModule) -> str:
    """Name of what runs attentions in integers where the module lies, or ""."""
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device.type if tensors else "cpu"
    for op in (*kernels.ATTENTIONS.values(), kernels.attention_packed):
        nodes = module.graph.find_nodes(op="call_function", target=op.definition)
        if op is kernels.attention_packed:
            nodes = [node for node in nodes if any(c and c.integers for c in codecs_of(arguments(node)["codec"]))]
        if nodes:
            return kernels.used("attention_int8" if op is kernels.attention_packed else op.name, device)
    return ""
