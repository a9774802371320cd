import re

import pytest
import torch
from torch import nn

from fxq.models.causal_wan import RMSNorm, apply_rope
from fxq.passes.fusions.fuse_rotary import FuseRotary
from tests.passes.fusions.fusing import count, error, frozen, fused
from tests.toys import rows

HEADS, SIZE, TOKENS = 3, 12, 10
WIDTH = HEADS * SIZE


def rope_into_slices(x, cos, sin):
    """The rotation written into a new tensor, by tables that hold every value twice."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out.type_as(x)


class Query(nn.Module):
    """A linear, a norm, heads and a rotation in one of many forms."""

    def __init__(self, norm, rope):
        super().__init__()
        self.rope, self.kind = rope, norm
        self.q = nn.Linear(48, WIDTH)
        norms = {"own": RMSNorm(WIDTH, 1e-6), "torch": nn.RMSNorm(WIDTH, 1e-5), "per head": nn.RMSNorm(SIZE, 1e-5)}
        norms |= {"no weight": nn.RMSNorm(WIDTH, 1e-5, elementwise_affine=False), "no eps": nn.RMSNorm(WIDTH)}
        self.norm = norms.get(norm, nn.Identity())
        for weight in self.norm.parameters():
            nn.init.normal_(weight)

    def forward(self, x, cos, sin):
        x = self.q(x)
        if self.kind == "per head":
            h = self.norm(x.unflatten(-1, (HEADS, -1)))
        else:
            normed = self.norm(x)
            h = normed.unflatten(-1, (HEADS, -1))
        match self.rope:
            case "stack":
                h = apply_rope(h, cos, sin)
            case "slices":
                repeated = (t.repeat_interleave(2, dim=1)[None, :, None] for t in (cos, sin))
                h = rope_into_slices(h, *repeated)
            case "norm read":
                return apply_rope(h, cos, sin) + normed.mean()
            case "table per head":
                h = apply_heads(h, cos, sin)
            case "no heads":
                return normed * 2
            case "float32":
                h = apply_rope(h.float(), cos, sin)
        return h.transpose(1, 2)


def apply_heads(x, cos, sin):
    """A rotation whose angles differ from head to head."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    speed = torch.arange(1, HEADS + 1, device=x.device)[:, None]
    c, s = cos[:, None] * speed, sin[:, None] * speed
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


def inputs(batch=2, dtype=torch.float32):
    angle = 6 * rows(TOKENS, SIZE // 2, seed=5)
    return rows(batch, TOKENS, 48).to(dtype), angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("norm", "rope"), [(n, r) for n in ("own", "torch", "none") for r in ("stack", "slices", "none") if n != r]
)
def test_norm_heads_and_rotation_become_one_operator(norm, rope, dtype):
    args = inputs(dtype=dtype)
    q = frozen(Query(norm, rope).to(dtype), args)
    graph = fused(q, FuseRotary())
    (node,) = (n for n in graph.module.graph.nodes if "rms_norm_rope" in str(n.target))
    assert [n is None for n in node.args[1:5]] == [norm == "none", False, rope == "none", rope == "none"]
    assert node.args[2] == {"own": 1e-6, "torch": 1e-5, "none": 0.0}[norm] and node.args[5] == HEADS
    for name in ("rms_norm", "rsqrt", "mul", "stack", "copy_", "empty_like"):
        assert count(graph, f"aten.{name}") == 0
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 2e-2)
    what = " and ".join([*(["norm"] if norm != "none" else []), *(["rotation"] if rope != "none" else [])])
    assert graph.remarks == {"q": [f"{what} after it in one pass"]}


@pytest.mark.parametrize("rope", ["stack", "slices"])
def test_another_batch_size_runs(rope):
    q = frozen(Query("own", rope), inputs())
    assert error(fused(q, FuseRotary()), q, *inputs(batch=5)) < 1e-6


UNSPLIT = "norm after it not fused: its result is not split into heads"


@pytest.mark.parametrize(
    ("norm", "rope", "reasons"),
    [
        ("own", "norm read", ["norm and rotation after it not fused: mul_1 is also read by mean_1", UNSPLIT]),
        ("own", "no heads", [UNSPLIT]),
        ("torch", "no heads", [UNSPLIT]),
        ("no weight", "none", ["norm after it not fused: its norm has no weight"]),
        ("no eps", "none", ["norm after it not fused: its norm has no eps"]),
        (
            "per head",
            "none",
            ["norm after it not fused: its input is [B, 10, 3, 12]: expected [B, S, heads * head_dim]"],
        ),
    ],
)
def test_what_is_not_of_the_form_stays_with_the_reason(norm, rope, reasons):
    args = inputs()
    q = frozen(Query(norm, rope), args)
    graph = fused(q, FuseRotary())
    assert error(graph, q, *args) == 0 and count(graph, "fxq.rms_norm_rope") == 0
    assert [re.sub(r"s\d+", "B", text) for text in graph.remarks["q"]] == reasons


@pytest.mark.parametrize(
    ("rope", "dtype", "reason"),
    [
        ("table per head", torch.float32, r"mul_2 is [10, 3, 6]: expected [10, 6]"),
        ("float32", torch.bfloat16, "its result is not torch.bfloat16"),
    ],
)
def test_a_norm_whose_rotation_stays_is_fused_alone(rope, dtype, reason):
    args = inputs(dtype=dtype)
    q = frozen(Query("own", rope).to(dtype), args)
    graph = fused(q, FuseRotary())
    assert count(graph, "fxq.rms_norm_rope") == count(graph, "aten.stack") == 1
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 2e-2)
    left, done = graph.remarks["q"]
    assert left.startswith(f"norm and rotation after it not fused: {reason}") and done == "norm after it in one pass"
