import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxq.calibration import attention_errors as module
from fxq.calibration.attention_errors import AttentionErrors, see
from fxq.kernels import attention_int8
from fxq.runtime.workers import Workers
from tests.toys import rows


def node_of(mask=False):
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    args = (q, k, v, q) if mask else (q, k, v)
    return graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, args), (q, k, v)


def relative(q, k, v):
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).double()
    got = attention_int8(q.transpose(1, 2), [k.transpose(1, 2)], [v.transpose(1, 2)]).double()
    return (got - want).square().sum(), want.square().sum()


def test_errors_add_up_over_calls_and_ranks():
    node, inputs = node_of()
    calls = [[rows(2, 3, n, 16, seed=seed + i) for i, n in enumerate((9, 40, 40))] for seed in (0, 10)]
    one, other = AttentionErrors(), AttentionErrors()
    for errors, (q, k, v) in zip((one, other), calls, strict=True):
        see(errors, node, dict(zip(inputs, (q, k, v), strict=True)), F.scaled_dot_product_attention(q, k, v))

    class Pair(Workers):
        def gather(self, tensors):
            return [dict(tensors), other._sums]

    one.merge(Pair())
    (a, b), (c, d) = (relative(*call) for call in calls)
    assert one.found() == {node.name: pytest.approx(float((a + c) / (b + d)) ** 0.5, rel=1e-6)}


def test_at_most_so_many_queries_of_a_call_are_compared(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)
    node, inputs = node_of()
    q, k, v = rows(1, 1, 10, 16), rows(1, 1, 20, 16, seed=1), rows(1, 1, 20, 16, seed=2)
    errors = AttentionErrors()
    see(errors, node, dict(zip(inputs, (q, k, v), strict=True)), F.scaled_dot_product_attention(q, k, v))
    noise, signal = relative(q[:, :, ::3], k, v)
    assert errors.found() == {node.name: pytest.approx(float(noise / signal) ** 0.5, rel=1e-5)}


def test_what_the_operator_does_not_take_is_not_measured():
    errors = AttentionErrors()
    q = rows(1, 2, 5, 16)
    masked, (a, b, c) = node_of(mask=True)
    see(errors, masked, {a: q, b: q, c: q}, q)
    node, (a, b, c) = node_of()
    see(errors, node, {a: q, b: q[:, :1], c: q[:, :1]}, q)
    see(None, node, {}, q)
    errors.add(node, q[:, :, :0], q, q, q[:, :, :0])
    assert errors.found() == {}
