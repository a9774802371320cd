"""Which parameter is which layer, and that edits are noticed; tests of the backend itself compile models."""

import gc

import pytest
import torch
from torch import nn

import fxq
from fxq.integrations.binding import BackendError, Binding, bind
from fxq.integrations.swap import ApplyError
from tests.toys import recipe, rows, toy


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [rows(40, 96)], recipe(), progress=False)


@pytest.fixture
def model():
    return toy()


@pytest.fixture
def binding(model, quantized):
    return bind(model, quantized)


def test_weights_of_layers_are_bound_and_the_others_stay_floats(model, binding):
    up, head = model.blocks[0].up, model.head
    assert binding.layer_of(up.weight, up.bias).plan.layer == "blocks.0.up"
    assert binding.layer_of(head.weight, head.bias) is None
    layers = binding.layers_of([(head.weight, None), (model.blocks[0].down.weight, model.blocks[0].down.bias)])
    assert layers[0] is None and layers[1].plan.layer == "blocks.0.down"


def test_layers_that_nothing_asked_for_are_unserved(model, binding):
    assert binding.unserved() == ["blocks.0.up", "blocks.0.down"]
    binding.layer_of(model.blocks[0].down.weight, model.blocks[0].down.bias)
    binding.layer_of(model.head.weight, model.head.bias)
    assert binding.unserved() == ["blocks.0.up"]


def test_entries_have_the_parameters_name_and_a_sum_only_where_edits_matter(model, binding):
    up, head = binding.find(model.blocks[0].up.weight), binding.find(model.head.weight)
    assert (up.name, head.name) == ("blocks.0.up.weight", "head.weight")
    assert len(up.sums) == 1 and head.sums == []
    assert up.next_sum(model.blocks[0].up.weight) == (up.sums[0], up.sums[0])


def test_a_tensor_that_is_no_parameter_of_the_model_is_not_bound(model, binding):
    copied = model.blocks[0].up.weight.detach().clone()
    assert binding.find(copied) is None and binding.find(None) is None
    with pytest.raises(BackendError, match=r"a weight \(64, 96\) that is not bound .*fxq.bind\(model, bundle\)"):
        binding.layer_of(copied)


EDITS = {
    "operator": lambda p: p.mul_(2),
    "memory": lambda p: p.detach().numpy().__setitem__((0, 0), 7.0),
    "data": lambda p: setattr(p, "data", p.data.clone()),
    "dtype": lambda p: setattr(p, "data", p.data.half()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_weight_is_refused_by_name(model, binding, edit):
    up = model.blocks[0].up
    binding.layer_of(up.weight, up.bias)
    with torch.no_grad():
        EDITS[edit](up.weight)
    with pytest.raises(BackendError, match=r"blocks.0.up.weight was edited, moved or cast after it was bound"):
        binding.layer_of(up.weight, up.bias)


@pytest.mark.parametrize("bias", ["none", "another", "edited"])
def test_another_bias_than_was_quantized_is_refused(model, binding, bias):
    up = model.blocks[0].up
    if bias == "edited":
        with torch.no_grad():
            up.bias.add_(1)
    given = {"none": None, "another": nn.Parameter(up.bias + 1), "edited": up.bias}[bias]
    with pytest.raises(BackendError, match=r"the bias of blocks.0.up.weight is another one than was quantized"):
        binding.layer_of(up.weight, given)


def test_a_bias_of_the_same_values_serves_and_is_watched_from_then_on(model, binding):
    up = model.blocks[0].up
    same = nn.Parameter(up.bias.detach().clone())
    assert binding.layer_of(up.weight, same).plan.layer == "blocks.0.up"
    with torch.no_grad():
        same.add_(1)
    with pytest.raises(BackendError, match=r"the bias of blocks.0.up.weight was edited"):
        binding.layer_of(up.weight, same)


def test_a_binding_does_not_keep_the_model_and_takes_no_new_tensor_for_an_old_one(quantized):
    model = toy()
    binding, weight = bind(model, quantized), model.blocks[0].up.weight
    number = id(weight)
    del model, weight
    gc.collect()
    assert all(entry.parameter() is None for entry in binding._entries.values())
    stranger = nn.Parameter(torch.ones(2, 2))
    binding._entries[id(stranger)] = binding._entries.pop(number)
    assert binding.find(stranger) is None


def test_an_empty_binding_serves_nothing():
    assert Binding().unserved() == []
    with pytest.raises(BackendError, match="not bound"):
        Binding().layer_of(torch.ones(2, 2))


def test_a_model_that_does_not_fit_is_refused(quantized):
    with pytest.raises(ApplyError):
        bind(toy(hidden=128), quantized)
