"""Tensors on another device or in another layout are refused by name, in every operator; odd strides are read right."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from fxq import numerics
from fxq.kernels import (
    OPS,
    absorb,
    attention,
    attention_int8,
    attention_int8_fp8,
    attention_packed,
    attention_weighted,
    dual_scale_linear,
    guards,
    native,
    quantize_act,
)
from fxq.kernels.gemm.op import sample_operands
from fxq.kernels.gemm.panels import pack_panels

EVERY = [pytest.param(op, sample, id=f"{op.name}-{i}") for op in OPS for i, sample in enumerate(op.samples())]


def tensors_of(sample):
    """(position in the flat arguments, tensor)."""
    flat, spec = pytree.tree_flatten(sample)
    return flat, spec, [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]


def same(op, got, want):
    """Bit-equal, but for torch's attention and products, whose sums take another order."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    if op is attention_int8:  # a weight at a tie of two integers
        return all(torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in pairs)
    if op is attention_int8_fp8:  # a weight between two float8, which are an eighth apart
        return all(torch.allclose(a.float(), b.float(), atol=2**-5) for a, b in pairs)
    if op in (attention, attention_packed, attention_weighted, absorb):
        return all(torch.allclose(a, b, atol=1e-6 if a.dtype == torch.float32 else 1e-2) for a, b in pairs)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs if a.numel())


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("op", "sample"), EVERY)
def test_a_tensor_on_another_device_is_refused_by_name(op, sample, guard):
    flat, spec, positions = tensors_of(sample)
    names = [argument.name for argument in op.definition._schema.arguments]
    with guard():
        op(*sample)  # the usual call must not open the door
        for i in positions if len(positions) > 1 else ():
            wrong = [*flat[:i], flat[i].to("meta"), *flat[i + 1 :]]
            with pytest.raises(ValueError, match=rf"fxq::{op.name}: (\w+) is on (cpu|meta), .* on (cpu|meta)") as info:
                op(*pytree.tree_unflatten(wrong, spec))
            assert str(info.value).split(": ")[1].split(" ")[0] in names


@pytest.mark.parametrize(("op", "sample"), EVERY)
def test_meta_tensors_alone_give_the_shape(op, sample):
    moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), sample)
    for got, want in zip(pytree.tree_leaves(op(*moved)), pytree.tree_leaves(op(*sample)), strict=True):
        assert got.device.type == "meta" and got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("op", "sample"), EVERY)
def test_a_sparse_tensor_is_refused(op, sample, grad):
    flat, spec, positions = tensors_of(sample)
    for i in positions:
        if not flat[i].numel() or flat[i].dtype == torch.float8_e4m3fn:
            continue
        wrong = [*flat[:i], flat[i].to_sparse(), *flat[i + 1 :]]
        with torch.set_grad_enabled(grad), pytest.raises((ValueError, NotImplementedError, RuntimeError)) as info:
            op(*pytree.tree_unflatten(wrong, spec))
        assert "sparse" in str(info.value).lower()


def test_a_nested_tensor_is_refused():
    x = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)])
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=r"(?i)nested"):
        quantize_act(x, None, torch.ones(1), torch.zeros(1).int(), 64, 8)


def twisted(t):
    """The same numbers with other strides."""
    if t.ndim < 2:
        return torch.stack((t, t), dim=-1)[..., 0]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    "change", [twisted, lambda t: torch.stack((t, t))[1], lambda t: t.repeat_interleave(2, 0)[::2]]
)
@pytest.mark.parametrize(("op", "sample"), EVERY)
def test_every_stride_is_read_right(op, sample, change):
    flat, spec, positions = tensors_of(sample)
    want = op(*sample)
    for i in positions:
        other = change(flat[i])
        assert other.shape == flat[i].shape
        assert same(op, op(*pytree.tree_unflatten([*flat[:i], other, *flat[i + 1 :]], spec)), want)


@pytest.mark.parametrize(("op", "sample"), EVERY)
def test_expanded_tensors_are_read_right(op, sample):
    flat, spec, positions = tensors_of(sample)
    for i in positions:
        if flat[i].ndim and flat[i].shape[0]:
            expanded = flat[i][:1].expand(flat[i].shape)
            arguments = [*flat[:i], expanded, *flat[i + 1 :]]
            copied = [*flat[:i], expanded.contiguous(), *flat[i + 1 :]]
            assert same(op, op(*pytree.tree_unflatten(arguments, spec)), op(*pytree.tree_unflatten(copied, spec)))


@pytest.mark.parametrize("panels", [True, False])
def test_products_that_could_overflow_int32_are_refused(panels):
    for width, fits in ((2**17 - 1, True), (2**17, False)):
        w = torch.full((1, width), -128, dtype=torch.int8)
        arguments = (torch.full((1, width), -128, dtype=torch.int8), pack_panels(w, width) if panels else w)
        rest = (torch.ones(1, 1), torch.ones(1), torch.zeros(1), width, 8, torch.float32)
        if fits:
            assert float(dual_scale_linear(*arguments, *rest)) == float(torch.tensor(16384.0 * width))
            assert not numerics.unfit_width(width)
        else:
            with pytest.raises(ValueError, match="q has 131072 channels: their sum can overflow int32; at most 131071"):
                dual_scale_linear(*arguments, *rest)
            assert "131072 input channels can overflow the int32 sum" in numerics.unfit_width(width)
            assert numerics.unfit_width(width, per_token=True)


@pytest.mark.skipif(not native.ready(), reason=native.why_not() or "ready")
@pytest.mark.parametrize("entry", [-1, 64, 5000, -(2**31), 2**31 - 1])
def test_a_permutation_that_leaves_the_row_is_refused_by_the_native_kernels(entry):
    perm = torch.arange(64).int()
    perm[17] = entry
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="perm has entries outside of a row"):
        quantize_act(x, perm, torch.ones(1), torch.zeros(1).int(), 64, 8)


def test_the_usual_call_is_known_by_its_keys():
    operands = sample_operands((3, 64), 8, 64, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dual_scale_linear(*operands, torch.float32)
        before = set(guards._PLAIN)
        dual_scale_linear(*operands, torch.float32)
    assert before == guards._PLAIN and before
