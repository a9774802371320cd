import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fxq.capture.trace import TraceError, trace
from fxq.core.graph import linear_sites
from tests.toys import rows

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attends(nn.Module):
    """Attention of two heads of 16 whose mask is a function of positions and of a table."""

    def __init__(self, mask, score=None, sums=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("chunk", torch.tensor([0, 0, 1, 1, 1, 2, 2]))
        self._mask, self._score, self._sums = mask, score, sums

    def forward(self, x):
        length = x.shape[1]
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        blocks = create_block_mask(self._mask(self.chunk), None, None, length, length, device=x.device.type)
        y = flex_attention(q, k, v, self._score, blocks, scale=0.3, return_lse=self._sums)
        y, sums = y if self._sums else (y, None)
        y = self.out(y.transpose(1, 2).flatten(2))
        return y if sums is None else (y, sums)


def chunkwise(table):
    return lambda b, h, q, k: (table[q] >= table[k]) | ((h == 1) & (k == 0)) | ((b == 0) & (k == 6))


def causal(table):
    return lambda b, h, q, k: q >= k


def nearer_is_more(score, b, h, q, k):
    return score - (q - k)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", [chunkwise, causal])
def test_a_mask_that_is_a_function_becomes_a_tensor(mask):
    model = Attends(mask).eval().requires_grad_(False)
    graph = trace(model, (rows(2, 7, 32),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    targets = [node.target for node in graph.module.graph.nodes]
    assert targets.count(SDPA) == 1 and "higher_order" not in graph.module.code and "batch_dim" not in graph.module.code
    assert [site.layer for site in linear_sites(graph.module)] == ["qkv", "out"]
    x = rows(3, 7, 32, seed=5)
    assert torch.allclose(graph.module(x), model(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "options",
    [{"score": nearer_is_more}, pytest.param({"sums": True}, marks=pytest.mark.sweep)],
    ids=["scores", "sums"],
)
def test_attention_that_no_mask_can_express_is_refused(options):
    with pytest.raises(TraceError, match=r"region (flex_attention|flat_apply) .*: use another attention backend"):
        trace(Attends(causal, **options).eval().requires_grad_(False), (rows(2, 7, 32),))
