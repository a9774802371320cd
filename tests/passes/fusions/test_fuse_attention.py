import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.passes.fusions.fuse_attention import FuseAttention
from tests.passes.fusions.fusing import count, error, frozen, fused
from tests.toys import rows

HEADS, SIZE = 3, 16
WIDTH = HEADS * SIZE


class Attend(nn.Module):
    """Attention in one of many forms, and a linear that reads it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.o = nn.Linear(WIDTH, 33)

    def forward(self, q, k, v, k0, v0):
        more = {}
        match self.how:
            case "pieces" | "keys wanted" | "other order":
                k, v = torch.cat((k0, k), dim=1), torch.cat((v0, v) if self.how != "other order" else (v, v0), dim=1)
            case "scale":
                more = {"scale": SIZE**-0.5, "dropout_p": 0.0, "is_causal": False}
            case "another scale":
                more = {"scale": 1.0}
            case "mask":
                more = {"attn_mask": q.new_zeros(q.shape[1], k.shape[1])}
            case "causal":
                more = {"is_causal": True}
            case "dropout":
                more = {"dropout_p": 1e-12}
            case "shared heads":
                k, v, more = k[:, :, :1], v[:, :, :1], {"enable_gqa": True}
            case "permute":
                q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
                y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).contiguous().flatten(2, 3)
                return self.o(y.type_as(q))
            case "heads first":
                return self.o(F.scaled_dot_product_attention(q, k, v).flatten(2))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **more)
        if self.how == "not flattened":
            return self.o(y.transpose(1, 2)[..., :1].expand(-1, -1, -1, SIZE).flatten(2))
        out = self.o(y.transpose(1, 2).flatten(2))
        return out + k.mean() if self.how == "keys wanted" else out


def inputs(batch=2, dtype=torch.float32):
    lengths = (7, 9, 9, 5, 5)
    return tuple(rows(batch, length, HEADS, SIZE, seed=i).to(dtype) for i, length in enumerate(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("how", "pieces"),
    [("one", 1), ("scale", 1), ("permute", 1), ("pieces", 2), ("keys wanted", 1), ("other order", 1)],
)
def test_attention_reads_what_lies_before_the_transposes(how, pieces, dtype):
    args = inputs(dtype=dtype)
    q = frozen(Attend(how).to(dtype), args)
    graph = fused(q, FuseAttention())
    (node,) = (n for n in graph.module.graph.nodes if "fxq.attention" in str(n.target))
    assert len(node.args[1]) == len(node.args[2]) == pieces
    assert count(graph, "aten.scaled_dot_product_attention") == count(graph, "aten.transpose") == 0
    assert count(graph, "aten.cat") == (0 if how in ("one", "scale", "permute", "pieces") else 2)
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 2e-2)
    text = "attention to 2 pieces of keys and values" if pieces == 2 else "attention fused"
    assert graph.remarks == {"o": [text]}


def test_another_batch_size_runs():
    q = frozen(Attend("pieces"), inputs())
    assert error(fused(q, FuseAttention()), q, *inputs(batch=3)) < 1e-6


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("mask", "it has a mask"),
        ("causal", "it is causal"),
        ("dropout", "it has a dropout of 1e-12"),
        ("another scale", "its scale is 1.0: expected head_dim ** -0.5"),
        ("shared heads", "3 query heads share 1 key heads"),
        ("heads first", "its query does not come from [B, S, heads, head_dim] through a transpose"),
        ("not flattened", "its result is not flattened to [B, S, heads * head_dim]"),
    ],
)
def test_what_is_not_of_the_form_stays_with_the_reason(how, reason):
    args = inputs()
    if how == "heads first":
        args = tuple(t.transpose(1, 2).contiguous() for t in args)
    model = Attend(how)
    if how == "heads first":
        model.o = nn.Linear(7 * SIZE, 33)
    q = frozen(model, args)
    graph = fused(q, FuseAttention())
    assert count(graph, "fxq.attention") == 0 and count(graph, "aten.scaled_dot_product_attention") == 1
    (texts,) = (graph.notes if how == "not flattened" else graph.remarks).values()
    assert texts == [f"attention left as it is: {reason}"]
