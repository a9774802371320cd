import copy
import pickle

import pytest
import torch

import fxq
from fxq.calls.captured import catch_up
from fxq.core.ir import QuantGraph, compiled_value, example_value
from tests.toys import recipe, rows, toy, wan_rollout

COPIES = {
    "itself": lambda module: module,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "fork": lambda module: QuantGraph.of(module).fork().module,
}


@pytest.fixture(scope="module")
def modules():
    rollout = wan_rollout(seeds=(1,), frames=2)
    return {
        "toy": fxq.quantize(toy(), (rows(9, 96),), recipe(8), progress=False),
        "wan": fxq.quantize(rollout.denoiser, rollout, recipe(8), progress=False),
    }


@pytest.fixture(scope="module")
def bundles(modules, tmp_path_factory):
    return {name: fxq.save(module, tmp_path_factory.mktemp("b") / name) for name, module in modules.items()}


def form(value):
    """Dtype and sizes, those that vary as the numbers they had."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(s if isinstance(s, int) else int(s.node.hint) for s in value.shape)
    if isinstance(value, list | tuple):
        return [form(part) for part in value]
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", ["toy", "wan"])
def test_values_of_a_loaded_graph_are_made_when_one_is_asked_for(name, copied, modules, bundles):
    module = COPIES[copied](fxq.load(bundles[name]))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    assert not any("val" in node.meta for node in nodes)
    assert example_value(nodes[-1]) is not None and compiled_value(nodes[0]) is not None
    made, saved = (
        {node.name: form(example_value(node)) for node in graph.nodes if node.op in ("placeholder", "call_function")}
        for graph in (module.graph, modules[name].graph)
    )
    assert made == saved


def test_sizes_that_vary_vary_in_the_values(bundles):
    module = fxq.load(bundles["toy"])
    (x,) = module.graph.find_nodes(op="placeholder")
    (*_, last) = (node for node in module.graph.nodes if node.op == "call_function")
    assert isinstance(example_value(x).shape[0], torch.SymInt)
    assert str(example_value(last).shape[0]) == str(example_value(x).shape[0])


def test_a_graph_that_only_runs_makes_no_values(bundles, modules):
    module = fxq.load(bundles["toy"])
    assert torch.equal(module(rows(9, 96)), modules["toy"](rows(9, 96)))
    (*_, last) = (node for node in module.graph.nodes if node.op == "call_function")
    assert "val" not in last.meta
    catch_up(module)
    assert example_value(last).shape[1] == 7


def test_values_are_made_under_inference_mode_and_autocast_too(bundles):
    module = fxq.load(bundles["toy"])
    (*_, last) = (node for node in module.graph.nodes if node.op == "call_function")
    with torch.inference_mode(), torch.autocast("cpu"):
        value = example_value(last)
    assert value.dtype == torch.float32 and not value.is_inference()
