import pytest
import torch
from torch import nn

from fxq.capture.trace import trace
from fxq.core.pipeline import PassError, run_passes
from fxq.passes.fusions.fuse_rotary import FuseRotary
from fxq.passes.fusions.real_rope import RealRope, make_rope_real
from tests.passes.fusions.fusing import count, error, frozen, fused
from tests.toys import rows

HEADS, SIZE, TOKENS = 3, 12, 10


class Complex(nn.Module):
    """Rotary embedding by complex numbers as the official models write it."""

    def __init__(self, how="cast"):
        super().__init__()
        self.how = how
        self.q = nn.Linear(48, HEADS * SIZE)

    def forward(self, x, table):
        h = self.q(x).unflatten(-1, (HEADS, -1))
        if self.how == "sample by sample":
            return torch.stack([self.sample(sample, table) for sample in h]).float()
        pairs = torch.view_as_complex(h.to(torch.float64).reshape(*h.shape[:-1], -1, 2))
        turned = table * pairs if self.how == "swapped" else pairs * table
        out = torch.view_as_real(turned).flatten(3)
        if self.how == "read twice":
            return out.type_as(x) + pairs.real.mean().type_as(x)
        return out if self.how == "no cast" else out.type_as(x)

    def sample(self, h, table):
        pairs = torch.view_as_complex(h[: TOKENS - 2].to(torch.float64).reshape(TOKENS - 2, HEADS, -1, 2))
        turned = torch.view_as_real(pairs * table[: TOKENS - 2]).flatten(2)
        return torch.cat((turned, h[TOKENS - 2 :]))


def inputs(dtype=torch.float32, table=torch.complex128):
    angle = 6 * rows(TOKENS, 1, SIZE // 2, seed=5).double()
    return rows(2, TOKENS, 48).to(dtype), torch.polar(torch.ones_like(angle), angle).to(table)


def double_or_complex(graph):
    """Operators whose result is a complex tensor, or of pairs in double precision."""
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.is_complex() or value.dtype == torch.float64):
            yield node.op if node.op == "placeholder" else str(node.target)


@pytest.mark.parametrize("table", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["cast", "swapped", "no cast", "sample by sample"])
def test_complex_rotation_becomes_real(how, dtype, table):
    args = inputs(dtype, table)
    q = frozen(Complex(how).to(dtype), args)
    graph = fused(q, RealRope())
    assert count(graph, "aten.view_as_complex") == count(graph, "aten.view_as_real") == 0
    times = 2 if how == "sample by sample" else 1
    assert graph.notes == {"rotary": ["complex rotation in real float32"] * times} and graph.log[0][1] == times
    assert error(graph, q, *args) < (1e-6 if dtype == torch.float32 else 1e-2)
    if how in ("cast", "swapped"):
        assert set(double_or_complex(graph)) <= {"placeholder", "aten.real.default", "aten.imag.default"}


def test_the_real_form_is_what_the_rotary_fusion_knows():
    args = inputs()
    q = frozen(Complex(), args)
    graph = fused(q, RealRope(), FuseRotary())
    assert count(graph, "fxq.rms_norm_rope") == 1 and count(graph, "aten.mul") == 0
    assert error(graph, q, *args) < 1e-6


def test_a_traced_graph_can_be_rewritten_too():
    model, args = Complex().eval(), inputs()
    graph = trace(model, args)
    assert make_rope_real(graph) == 1
    graph.module.graph.lint()
    graph.module.recompile()
    assert error(graph, model, *args) < 1e-6
    with pytest.raises(PassError, match="RealRope needs a FROZEN graph, this one is TRACED"):
        run_passes(graph, (RealRope(),))


def test_tables_are_split_once():
    graph = fused(frozen(Complex("sample by sample"), inputs()), RealRope())
    assert count(graph, "aten.real") == count(graph, "aten.imag") == 2  # one slice of the table per sample


def test_complex_numbers_that_something_else_reads_stay_with_the_reason():
    args = inputs()
    q = frozen(Complex("read twice"), args)
    graph = fused(q, RealRope())
    assert count(graph, "aten.view_as_real") == 1 and error(graph, q, *args) == 0
    (text,) = graph.notes["rotary"]
    assert text.startswith("complex rotation left as it is: view_as_complex is also read by real")
