import torch

import fxq
from fxq.core.ir import get_tensor, plan_of
from fxq.passes.apply_methods import group_order
from tests.toys import recipe, rows, toy


def test_group_order_is_what_is_stored():
    q = fxq.quantize(toy(), [rows(9, 96)], recipe())
    plan = next(plan_of(n) for n in q.graph.nodes if plan_of(n))
    assert torch.equal(get_tensor(q, "blocks.0.up.perm").long(), group_order(plan))
    assert not hasattr(q.get_submodule("blocks.0.down"), "perm")


def test_nothing_frozen_aliases_the_model():
    model, x = toy(), rows(9, 96)
    model.register_buffer("shift", torch.ones(7))
    forward = model.forward
    model.forward = lambda x: forward(x) + model.shift
    q = fxq.quantize(model, [x], recipe())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in (*q.parameters(), *q.buffers()))
    assert not list(q.parameters())
