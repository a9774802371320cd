"""No operator has a gradient, and none is left out in silence: backward raises, and names the operator."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxq.kernels import (
    OPS,
    dual_scale_linear,
    dual_scale_linear_quantize,
    native,
    norm_quantize,
    quantize_act,
    quantize_per_token,
    quantize_per_token_asymmetric,
)
from fxq.kernels.gemm.op import sample_operands

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GIVE_FLOATS = [op for op in OPS if op.name not in ("quantize_act", "norm_quantize", "dual_scale_linear_quantize")]


@pytest.fixture(params=["native", "eager"])
def implementation(request, monkeypatch):
    if request.param == "native" and not native.ready():
        pytest.skip(native.why_not())
    if request.param == "eager":
        monkeypatch.setattr(native, "ready", lambda: False)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


SCALE, ZERO = torch.tensor([0.05, 0.1]), torch.tensor([3, -4]).int()


def layer(x, **kept):
    """quantize_act and the product of one layer."""
    operands = sample_operands((1, 64), 64, 48, 8, random(1))
    q = quantize_act(x, None, SCALE, ZERO, 48, 8)
    return dual_scale_linear(q, *operands[1:], torch.float32)


def test_a_residual_does_not_give_half_of_the_gradient(implementation):
    x = torch.randn(4, 64, requires_grad=True)
    y = x + layer(x)
    assert y.requires_grad and torch.equal(y.detach(), x.detach() + layer(x.detach()))
    with pytest.raises(RuntimeError, match=r"fxq::dual_scale_linear has no gradient: .* torch.no_grad\(\)"):
        y.sum().backward()
    assert x.grad is None


def test_parameters_before_a_quantized_layer_are_not_forgotten(implementation):
    before, after = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)
    loss = after(layer(before(torch.randn(4, 64)))).sum()
    with pytest.raises(RuntimeError, match="has no gradient"):
        loss.backward()


def test_parameters_after_a_quantized_layer_learn_as_ever(implementation):
    after = torch.nn.Linear(64, 8)
    x = torch.randn(4, 64)
    after(layer(x)).sum().backward()
    assert torch.allclose(after.weight.grad, layer(x).sum(0).expand(8, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", [lambda q: q[1:3], lambda q: q.view(2, 2, 64)[1], lambda q: q.unsqueeze(0)])
def test_views_of_integers_keep_what_they_were_made_of(view, implementation):
    x = torch.randn(4, 64, requires_grad=True)
    operands = sample_operands((1, 64), 64, 48, 8, random(1))
    q = view(quantize_act(x, None, SCALE, ZERO, 48, 8))
    y = dual_scale_linear(q, *operands[1:], torch.float32)
    assert y.requires_grad


def test_integers_hand_it_on_through_a_fused_chain(implementation):
    x = torch.randn(1, 4, 64, requires_grad=True)
    gain = torch.randn(1, 1, 64, requires_grad=True)
    first, second = (sample_operands((1, 4, 64), 64, 48, 8, random(seed), panels=True) for seed in (1, 2))
    for inputs in ((x, None), (x.detach(), gain)):
        q = norm_quantize(inputs[0], None, None, inputs[1], inputs[1], 1e-6, None, SCALE, ZERO, 48, 8)
        hidden = dual_scale_linear_quantize(q, *first[1:], "gelu", SCALE, ZERO, 48, 8)
        assert not hidden.requires_grad
        y = dual_scale_linear(hidden, *second[1:], torch.float32)
        with pytest.raises(RuntimeError, match="fxq::dual_scale_linear has no gradient"):
            y.sum().backward()


@pytest.mark.parametrize("op", GIVE_FLOATS, ids=lambda op: op.name)
def test_every_float_result_of_an_input_with_a_gradient_raises_in_backward(op, implementation):
    for sample in op.samples():
        flat, spec = pytree.tree_flatten(sample)
        for i, value in enumerate(flat):
            if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS:
                continue
            leaf = value.clone().requires_grad_()
            result = op(*pytree.tree_unflatten([*flat[:i], leaf, *flat[i + 1 :]], spec))
            loss = sum(t.float().sum() for t in pytree.tree_leaves(result) if t.is_floating_point())
            if loss.requires_grad:
                with pytest.raises(RuntimeError, match=f"fxq::{op.name} has no gradient"):
                    loss.backward()
            else:
                raise AssertionError(f"argument {i} of {op.name} lost its gradient")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(guard, implementation):
    x = torch.randn(4, 64, requires_grad=True)
    with guard():
        q = quantize_act(x, None, SCALE, ZERO, 48, 8)
        y = layer(x)
    assert not y.requires_grad and vars(q) == {}


def test_gradients_of_gradients_and_of_functions_raise_too():
    x = torch.randn(4, 64)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="fxq::dual_scale_linear has no gradient"):
            transform(lambda t: (t + layer(t)).sum())(x)
    with pytest.raises(RuntimeError, match="fxq::quantize_act has no gradient"):
        torch.func.jvp(layer, (x,), (x,))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="fxq::quantize_act"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        assert torch.equal(layer(x), layer(x))


def test_one_asked_source_is_enough():
    """torch.autograd.grad visits only what leads to the asked tensors."""
    a, b = (torch.randn(4, 64, requires_grad=True) for _ in range(2))
    y = a + b + layer(a * 2 + b)
    for asked in (a, b):
        with pytest.raises(RuntimeError, match="has no gradient"):
            torch.autograd.grad(y.sum(), [asked], retain_graph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_raises_in_its_backward(backend):
    operands = sample_operands((1, 64), 64, 48, 8, random(1))

    def call(x):
        q = quantize_act.definition(x, None, SCALE, ZERO, 48, 8)
        return x + dual_scale_linear.definition(q, *operands[1:], torch.float32)

    compiled = torch.compile(call, backend=backend)
    x = torch.randn(4, 64, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, call(x))
    with pytest.raises(RuntimeError, match="fxq::dual_scale_linear has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(x), call(x))


def test_scales_per_token_are_on_the_tape():
    x = torch.randn(4, 64, requires_grad=True)
    q, scale = quantize_per_token(x, None, 48, 8)
    assert scale.requires_grad and not q.requires_grad
    with pytest.raises(RuntimeError, match="fxq::quantize_per_token has no gradient"):
        scale.sum().backward()
    q, scale = quantize_per_token_asymmetric(x, None, 48, 8)
    with pytest.raises(RuntimeError, match="fxq::quantize_per_token_asymmetric has no gradient"):
        scale.sum().backward()
