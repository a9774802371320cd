import pytest
import torch

import fxq
from fxq import numerics
from fxq.core.graph import unused_tensors
from fxq.core.ir import LAYER_TENSORS, Stage, get_tensor, plan_of, put_tensor
from fxq.core.layer import quantized_layers
from fxq.core.pipeline import run_passes
from fxq.passes import Freeze
from fxq.passes.apply_methods import group_order
from tests.core.test_verify import at
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


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_packed_under_their_final_names_and_compute_the_same(bits):
    graph, x = at(Stage.LOWERED, bits), rows(40, 96)
    lowered, want = graph.fork().module, graph.module(x)
    run_passes(graph, (Freeze(),))
    layers = list(quantized_layers(graph.module))
    assert graph.log[-1][1] == len(layers) == 2 and graph.stage == Stage.FROZEN
    for layer in layers:
        loose, final = get_tensor(lowered, f"{layer.name}.weight_int"), get_tensor(graph.module, f"{layer.name}.weight")
        assert torch.equal(final, numerics.pack_int4(loose) if bits == 4 else loose) and layer.bits == bits
        assert final.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert torch.equal(graph.module(x), want)


def test_nothing_is_left_that_no_node_reads():
    graph = at(Stage.LOWERED)
    put_tensor(graph.module, "spare.table", torch.ones(3))
    run_passes(graph, (Freeze(),))
    assert unused_tensors(graph.module) == [] and not graph.updates and not graph.statistics
    names = {name for name, _ in graph.module.named_buffers()}
    assert {name for name in names if not name.endswith(LAYER_TENSORS)} == {"head.bias"}
    assert "spare.table" not in names and not any(name.endswith("weight_int") for name in names)


def test_what_stays_in_floats_is_a_copy_without_gradient():
    graph = at(Stage.LOWERED)
    before = get_tensor(graph.module, "head.weight")
    run_passes(graph, (Freeze(),))
    after = get_tensor(graph.module, "head.weight")
    assert torch.equal(before, after) and before.data_ptr() != after.data_ptr() and not after.requires_grad
