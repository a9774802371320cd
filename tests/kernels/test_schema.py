"""Schemas follow from the classes of arguments; saved bundles call operators by them, so they are written out here."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fxq.kernels import OPS
from fxq.kernels.schema import flatten, schema_of, taker

OPERANDS = "Tensor q, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor offset, int split"
SCHEMAS = {
    "quantize_act(Tensor x, Tensor? perm, Tensor scale, Tensor zero_point, int split, int bits) -> Tensor",
    "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, float eps, Tensor? perm,"
    " Tensor scale, Tensor zero_point, int split, int bits) -> Tensor",
    f"dual_scale_linear({OPERANDS}, int bits, ScalarType dtype) -> Tensor",
    f"dual_scale_linear_quantize({OPERANDS}, int bits, str activation, Tensor out_scale, Tensor out_zero_point,"
    " int out_split, int out_bits) -> Tensor",
    f"dual_scale_linear_add({OPERANDS}, int bits, Tensor residual, Tensor? gate) -> Tensor",
    "rms_norm_rope(Tensor x, Tensor? weight, float eps, Tensor? cos, Tensor? sin, int heads) -> Tensor",
    "attention(Tensor q, Tensor[] k, Tensor[] v) -> Tensor",
    "attention_packed(Tensor q, Tensor[] k, Tensor[] v, Tensor[] packed_k, Tensor[] packed_v, Tensor cos, Tensor sin,"
    " str codec, int span) -> Tensor",
    "absorb(Tensor x, Tensor map) -> Tensor",
    "attention_weighted(Tensor q, Tensor[] k, Tensor[] v, Tensor few_k, Tensor few_v, Tensor weight) -> Tensor",
    "attention_int8(Tensor q, Tensor[] k, Tensor[] v) -> Tensor",
    "attention_int8_fp8(Tensor q, Tensor[] k, Tensor[] v) -> Tensor",
    "quantize_fp8(Tensor x, Tensor? perm, Tensor scale, int split) -> Tensor",
    f"dual_scale_linear_fp8({OPERANDS}, ScalarType dtype) -> Tensor",
    "quantize_fp8_per_token(Tensor x, Tensor? perm, int split) -> (Tensor q, Tensor scale)",
    "dual_scale_linear_fp8_per_token(Tensor q, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor offset,"
    " int split, ScalarType dtype) -> Tensor",
    "quantize_per_token(Tensor x, Tensor? perm, int split, int bits) -> (Tensor q, Tensor scale)",
    "quantize_per_token_asymmetric(Tensor x, Tensor? perm, int split, int bits) -> (Tensor q, Tensor scale)",
    "dual_scale_linear_per_token(Tensor q, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor offset,"
    " int split, int bits, ScalarType dtype) -> Tensor",
    f"dual_scale_linear_per_token_add({OPERANDS}, int bits, Tensor residual, Tensor? gate) -> Tensor",
    *(
        f"activation_quantize_per_token{kind}(Tensor x, str activation, Tensor? perm, int split, int bits)"
        " -> (Tensor q, Tensor scale)"
        for kind in ("", "_asymmetric")
    ),
    *(
        f"norm_quantize_per_token{kind}(Tensor x, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, float eps,"
        " Tensor? perm, int split, int bits) -> (Tensor q, Tensor scale)"
        for kind in ("", "_asymmetric")
    ),
}


class Tail(NamedTuple):
    perm: Tensor | None
    name: str


class Head(NamedTuple):
    x: Tensor
    pieces: Sequence[Tensor]
    count: int


class First(NamedTuple):
    head: Head
    eps: float


class Last(NamedTuple):
    dtype: torch.dtype
    eps: float
    tail: Tail


class Twice(NamedTuple):
    head: Head
    tail: Tail


class Wrong(NamedTuple):
    flags: list[bool]


def test_the_schemas_are_those_of_saved_bundles():
    assert {op.schema for op in OPS} == SCHEMAS
    assert {str(op.definition._schema) for op in OPS} == {f"fxq::{schema}" for schema in SCHEMAS}


@pytest.mark.parametrize(
    ("kind", "schema", "nested"),
    [
        (Head, "op(Tensor x, Tensor[] pieces, int count) -> Tensor", lambda v: Head(*v)),
        (First, "op(Tensor x, Tensor[] pieces, int count, float eps) -> Tensor", lambda v: First(Head(*v[:3]), v[3])),
        (
            Last,
            "op(ScalarType dtype, float eps, Tensor? perm, str name) -> Tensor",
            lambda v: Last(*v[:2], Tail(*v[2:])),
        ),
    ],
)
def test_a_class_within_a_class_stands_for_its_fields(kind, schema, nested):
    values = tuple(range(schema.count(",") + 1))
    assert schema_of("op", kind) == schema
    taken = taker(kind)(values)
    assert taken == nested(values) and type(taken) is kind and flatten(taken) == values


def test_results_of_several_tensors_have_names():
    assert schema_of("op", Tail, ("q", "scale")) == "op(Tensor? perm, str name) -> (Tensor q, Tensor scale)"


def test_what_the_dispatcher_does_not_know_is_named():
    with pytest.raises(TypeError, match=r"Wrong.flags is a list\[bool\]: expected one of Tensor, .*int.*, or a class"):
        schema_of("op", Wrong)
    with pytest.raises(TypeError, match="Twice has 2 fields that are classes of arguments: expected one"):
        taker(Twice)


@pytest.mark.parametrize("change", [lambda sample: sample[:-1], lambda sample: (*sample, 0)])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_wrong_number_of_arguments_is_refused(op, change):
    wrong = change(op.samples()[0])
    for call in (op.supports, op.reference):
        with pytest.raises(TypeError, match=f"fxq::{op.name} takes .* arguments, not {len(wrong)}: {op.name}"):
            call(*wrong)
    with pytest.raises(RuntimeError, match=op.name):
        op(*wrong)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_facade_takes_flat_arguments_and_the_parts_one_object(op):
    for example, sample in zip(op.examples(), op.samples(), strict=True):
        assert len(sample) == len(op.definition._schema.arguments)
        assert type(op.take(sample)) is type(example) and op.supports(*sample) == op.unfit(op.take(sample)) == ""
