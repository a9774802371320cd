"""What is not finite stays visible in every operator and every implementation, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fxq import numerics
from fxq.kernels import (
    attention,
    dual_scale_linear,
    dual_scale_linear_add,
    dual_scale_linear_per_token,
    dual_scale_linear_quantize,
    native,
    norm_quantize,
    quantize_act,
    quantize_per_token,
    rms_norm_rope,
)
from fxq.kernels.gemm.op import sample_operands
from tests.kernels.not_finite import BAD, MEASURING, NORMS, every_case, implementations, shows

CASES = [
    pytest.param(op, run, sound, broken, rows, id=f"{name}-{kind}")
    for name, op, sound, broken, rows in every_case()
    for kind, run in implementations(op).items()
]
KINDS = ("reference", "eager", "native") if native.ready() else ("reference", "eager")


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def using(op, kind):
    return implementations(op)[kind]


@pytest.mark.parametrize(("op", "run", "sound", "broken", "rows"), CASES)
def test_a_row_that_is_not_finite_shows_it_and_the_others_do_not_change(op, run, sound, broken, rows):
    clean, got = run(*sound), run(*broken)
    assert torch.equal(shows(op, got, len(rows)), rows)
    assert not shows(op, clean, len(rows)).any()
    for before, after in zip(pytree.tree_leaves(clean), pytree.tree_leaves(got), strict=True):
        left, right = (t.reshape(len(rows), -1)[~rows] for t in (before, after))
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("op", [quantize_act, *(op for op in MEASURING if not op.max_error)])
def test_all_implementations_agree_on_every_integer_of_broken_rows(op):
    for _, case, _, broken, _ in every_case():
        if case is op:
            results = [pytree.tree_leaves(run(*broken)) for run in implementations(op).values()]
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert torch.equal(a.float().nan_to_num(1e30), b.float().nan_to_num(1e30))


def test_the_mark_is_the_documented_constant():
    bits = [numerics.POISON >> j & 1 for j in range(32)]
    assert numerics.poison_codes(70).tolist() == [127 if bit else -128 for bit in bits]
    assert numerics.poison_codes(20).tolist() == numerics.poison_codes(70).tolist()[:20]
    assert 12 <= sum(bits) <= 20 and 5 <= sum(bits[:16]) <= 11
    assert bits[:8] != bits[8:16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_the_mark_is_told_from_finite_rows_clipped_at_both_ends(kind, bits):
    x = torch.where(torch.rand(4000, 33, generator=random()) < 0.5, -1e9, 1e9)
    arguments = (x, None, torch.tensor([0.1]), torch.tensor([3]).int(), 33, bits)
    q = using(quantize_act, kind)(*arguments)
    low, high = numerics.integer_range(bits)
    assert set(q.unique().tolist()) == {low, high} and not numerics.poisoned(q).any()
    x[17, 32] = float("nan")
    assert numerics.poisoned(using(quantize_act, kind)(*arguments)).nonzero().tolist() == [[17]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("panels", [False, True])
def test_the_chain_of_a_feed_forward_shows_it_at_its_end(kind, activation, value, panels):
    x = torch.randn(2, 9, 75, generator=random(1))
    x[1, 4, 70] = value
    perm = torch.randperm(75, generator=random(2)).int()
    scale, zero = torch.tensor([0.05, 0.2]), torch.tensor([3, -7]).int()
    first = sample_operands((2, 9, 75), 96, 50, 8, random(3), panels)
    second = sample_operands((2, 9, 96), 40, 64, 8, random(4), panels)
    q = using(quantize_act, kind)(x, perm, scale, zero, 50, 8)
    hidden = using(dual_scale_linear_quantize, kind)(q, *first[1:], activation, scale, zero, 64, 8)
    residual = torch.randn(2, 9, 40, generator=random(5))
    for y in (
        using(dual_scale_linear, kind)(hidden, *second[1:], torch.bfloat16),
        using(dual_scale_linear_add, kind)(hidden, *second[1:], residual, torch.zeros(2, 3, 40)),
    ):
        broken = ~y.isfinite()
        assert broken[1, 4].all() and int(broken.sum()) == 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", ["weight_scale", "offset", "input_scale", "out_scale"])
def test_a_constant_that_is_not_finite_marks_every_row_of_a_quantized_product(kind, value, place):
    arguments = list(sample_operands((5, 96), 130, 64, 8, random(6), panels=True))
    tail = ["gelu", torch.tensor([0.05, 0.2]), torch.tensor([3, -7]).int(), 97, 8]
    arguments[0][:] = 1
    target = {"weight_scale": arguments[2][1], "input_scale": arguments[3], "offset": arguments[4]}
    column = target.get(place)
    if column is None:
        tail[1] = torch.tensor([0.05, float("nan")])
    else:
        column[len(column) // 2] = value
    q = using(dual_scale_linear_quantize, kind)(*arguments, *tail)
    if value == -float("inf") and place == "offset":
        assert numerics.poisoned(q).all()  # gelu(-inf) is NaN
    assert numerics.poisoned(q).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", BAD)
def test_a_bias_that_is_not_finite_shows_in_its_column_alone(kind, value):
    arguments = sample_operands((5, 96), 40, 64, 8, random(7))
    arguments.offset[3] = value
    y = using(dual_scale_linear, kind)(*arguments, torch.float32)
    assert (~y.isfinite()).any(0).nonzero().tolist() == [[3]] and not y[:, 3].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [float("nan"), 0.0, 1e-40])
def test_a_scale_without_a_finite_reciprocal_marks_every_row(kind, scale):
    x = torch.randn(4, 40, generator=random(8))
    q = using(quantize_act, kind)(x, None, torch.tensor([0.1, scale]), torch.zeros(2).int(), 30, 8)
    assert numerics.poisoned(q).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_whose_variance_overflows_is_marked_instead_of_zero(kind):
    x = torch.randn(1, 3, 96, generator=random(9))
    x[0, 1] *= 1e30
    rest = (None, torch.ones(96), None, None, 1e-6, None, torch.tensor([0.05]), torch.zeros(1).int(), 96, 8)
    assert numerics.poisoned(using(norm_quantize, kind)(x, *rest))[0].tolist() == [False, True, False]
    for op in NORMS:
        q, scale = using(op, kind)(x, *rest[:6], 50, 8)
        assert scale[0, :, :2].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2] and not q[0, 1].any()
    y = using(rms_norm_rope, kind)(x, torch.ones(96), 1e-6, None, None, 4)
    assert (~y.isfinite()).flatten(2).any(2)[0].tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("frame", ["gain", "shift"])
def test_a_modulation_that_is_not_finite_marks_the_rows_of_its_frame(kind, value, frame):
    x = torch.randn(1, 6, 96, generator=random(10))
    gain, shift = torch.randn(2, 1, 3, 96, generator=random(11)).unbind()
    (gain if frame == "gain" else shift)[0, 1, 90] = value
    rest = (gain, shift, 1e-6, None, torch.tensor([0.05]), torch.zeros(1).int(), 96, 8)
    for op in NORMS:
        _, scale = using(op, kind)(x, None, None, *rest[:4], 50, 8)
        assert scale[0, :, 1].isnan().tolist() == [False, False, True, True, False, False]
        assert not scale[0, :, 0].isnan().any()  # the other group of channels
    got = numerics.poisoned(using(norm_quantize, kind)(x, None, None, *rest))
    assert got[0].tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_per_token_carry_it_into_the_product(kind):
    x = torch.randn(5, 75, generator=random(12))
    x[1, 3], x[2, 70] = float("inf"), float("nan")
    q, scale = using(quantize_per_token, kind)(x, None, 50, 8)
    assert scale.isnan().tolist() == [[False, False], [True, False], [False, True], [False, False], [False, False]]
    assert not q[1, :50].any() and not q[2, 50:].any()
    _, weight, weight_scale, _, offset, split, bits = sample_operands((5, 75), 40, 50, 8, random(13), panels=True)
    run = using(dual_scale_linear_per_token, kind)
    y = run(q, scale, weight, weight_scale, offset, split, bits, torch.float32)
    assert (~y.isfinite()).all(1).tolist() == (~y.isfinite()).any(1).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_rows_are_not_marked_and_planning_says_why(kind):
    x = torch.full((2, 15), float("inf"))
    q = using(quantize_act, kind)(x, None, torch.ones(1), torch.zeros(1).int(), 15, 8)
    assert q.unique().tolist() == [127] and not numerics.poisoned(q).any()
    assert numerics.unfit_width(15) == "fewer than 16 input channels: its integers cannot show what is not finite"
    assert not numerics.unfit_width(15, per_token=True) and not numerics.unfit_width(16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_beyond_its_dtype_is_infinite_as_in_torch(kind, dtype):
    arguments = sample_operands((3, 64), 20, 64, 8, random(14), panels=True)
    arguments.offset.fill_(3.4e38)
    y = using(dual_scale_linear, kind)(*arguments, dtype)
    assert y.isinf().all()


@settings(max_examples=40)
@given(data=st.data())
def test_marks_survive_any_shape_split_and_number_of_bits(data):
    width = data.draw(st.integers(16, 90))
    split = data.draw(st.integers(1, width))
    groups = 1 if split == width else 2
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(7, width).to(dtype)
    rows = torch.zeros(7, dtype=torch.bool)
    for _ in range(data.draw(st.integers(0, 3))):
        row = data.draw(st.integers(0, 6))
        rows[row] = True
        x[row, data.draw(st.integers(0, width - 1))] = data.draw(st.sampled_from(BAD))
    perm = torch.randperm(width).int() if data.draw(st.booleans()) else None
    tail = (torch.rand(groups) * 0.1 + 0.01, torch.randint(-99, 99, (groups,)).int(), split)
    arguments = (x, perm, *tail, data.draw(st.integers(2, 8)))
    results = [run(*arguments) for run in implementations(quantize_act).values()]
    assert torch.equal(numerics.poisoned(results[0]), rows)
    assert all(torch.equal(results[0], other) for other in results[1:])
    back = numerics.dequantize_input(results[0], *tail)
    assert torch.equal(~back.isfinite().all(1), rows)


def softmax_attention(q, k, v):
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double()).flatten(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", ["q", "k", "v", "every key"])
def test_attention_shows_what_softmax_shows(kind, dtype, value, place):
    q, k, v = (torch.randn(2, length, 3, 32, generator=random(15)).to(dtype) for length in (9, 40, 40))
    if place == "every key":
        k[1, :, 2, 5] = value
    else:
        {"q": q, "k": k, "v": v}[place][1, 7, 2, 5] = value
    got = using(attention, kind)(q, [k[:, :25], k[:, 25:]], [v[:, :25], v[:, 25:]])
    assert torch.equal(got.isfinite(), softmax_attention(q, k, v).isfinite())
    assert not got.isfinite().all()
