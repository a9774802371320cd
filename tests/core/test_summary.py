"""What a summary says of each linear, its totals and its two forms."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import fxq
from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph, Stage, get_tensor
from fxq.core.pipeline import run_passes
from fxq.core.summary import LayerRow, Summary
from fxq.passes import MergeLinears
from tests.toys import recipe, rows, toy

ROW = LayerRow("a", True, "", "W8A8", (3, 5), 0, None, 30, 60, "reference")
KEPT = dataclasses.replace(ROW, layer="b", quantized=False, reason="too narrow", bits="-", bytes=0, kernel="")
OTHER = dataclasses.replace(KEPT, layer="c", reason="matrix product that is no linear: aten.mm")


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [rows(40, 96)], recipe(4), progress=False)


def test_rows_are_the_linears_in_order_with_their_sizes(quantized):
    rows_ = fxq.summary(quantized).rows
    assert [(row.layer, row.quantized, row.bits, row.shape, row.outliers) for row in rows_] == [
        ("blocks.0.up", True, "W4A8", (64, 96), 32),
        ("blocks.0.down", True, "W4A8", (96, 64), 0),
        ("head", False, "-", (7, 96), 0),
    ]
    assert rows_[2].reason == "prediction head: tiny and sensitive" and rows_[2].kernel == ""
    assert min(rows_[0].output_sqnr, rows_[1].output_sqnr) > 10 and rows_[2].output_sqnr is None


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("blocks.0.up", ("weight", "weight_scale", "input_scale", "input_zero_point", "offset", "perm")),
        ("blocks.0.down", ("weight", "weight_scale", "input_scale", "input_zero_point", "offset")),
    ],
)
def test_bytes_are_those_of_the_layers_tensors(quantized, layer, names):
    row = next(row for row in fxq.summary(quantized).rows if row.layer == layer)
    stored = [get_tensor(quantized, f"{layer}.{name}") for name in names]
    assert row.bytes == sum(t.numel() * t.element_size() for t in stored)
    assert row.bf16_bytes == 2 * row.shape[0] * (row.shape[1] + 1)


def test_bytes_of_merged_layers_add_up_to_what_is_stored():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.q(x), self.k(x)

    q = fxq.quantize(Siblings().eval(), [rows(9, 64)], recipe(dual_scale=False), progress=False)
    merged = QuantGraph(q, Stage.FROZEN).fork()
    assert run_passes(merged, (MergeLinears(),)).log[-1][1]
    before, after = fxq.summary(q), fxq.summary(merged.module)
    assert [row.layer for row in after.rows] == [row.layer for row in before.rows] == ["q", "k"]
    joint = {node.target for node in merged.module.graph.nodes if node.op == "get_attr"}
    stored = sum(t.numel() * t.element_size() for t in (get_tensor(merged.module, name) for name in joint))
    lost = stored - sum(row.bytes for row in after.rows)
    assert 0 <= lost < len(after.rows)  # shares are rounded down


def test_totals_count_quantized_kept_and_other_products_apart():
    summary = Summary((ROW, KEPT, OTHER), {})
    assert (summary.quantized, summary.kept, summary.others) == ((ROW,), (KEPT, OTHER), (OTHER,))
    assert summary.ratio == 0.5 and Summary((KEPT,), {}).ratio == 1.0
    told = json.loads(summary.to_json())
    assert (told["quantized"], told["kept"], told["other_products"], told["size_ratio_to_bf16"]) == (1, 1, 1, 0.5)
    assert [row["layer"] for row in told["layers"]] == ["a", "b", "c"]
    assert "1 linears quantized, 1 kept, 1 other product, 0.500x of bf16" in str(summary)


def test_the_table_shows_kernels_remarks_and_reasons_as_plain_text():
    remarked = dataclasses.replace(ROW, layer="[red]a[/red]", remarks=("fused",), output_sqnr=31.26, outliers=2)
    lines = str(Summary((remarked, KEPT), {})).splitlines()
    (first,) = [line for line in lines if "[red]a[/red]" in line]
    assert "reference; fused" in first and "31.3" in first and "3x5" in first
    assert any("too narrow" in line for line in lines)


def test_a_note_on_many_modules_is_said_once_with_the_first_three():
    notes = {f"m{i}": ["no rotation", "no rotation"] for i in range(5)} | {"n": ["no norm"]}
    text = str(Summary((ROW,), {}, notes))
    assert "no rotation: m0, m1, m2 and 2 more" in text and "n: no norm" in text
    assert text.count("no rotation") == 1


def test_layers_without_a_plan_and_those_never_called_have_a_reason(quantized):
    plain = fxq.capture.trace.trace(toy(), (rows(3, 96),)).module
    facts = dataclasses.replace(Facts.of(quantized), never_called=["spare"])
    facts.attach(plain)
    assert {row.layer: row.reason for row in fxq.summary(plain).rows} == {
        "blocks.0.up": "not planned",
        "blocks.0.down": "not planned",
        "head": "not planned",
        "spare": "never called in the captured graph",
    }


def test_a_module_without_facts_is_refused():
    with pytest.raises(ValueError, match="fxq"):
        fxq.summary(torch.fx.symbolic_trace(nn.Linear(3, 3)))
