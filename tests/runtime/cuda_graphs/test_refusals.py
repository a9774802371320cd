"""What a graph would replay otherwise than the module computes it is refused in one clear line."""

import pytest
import torch
from torch import nn

import fxq
from fxq.runtime.cuda_graphs import refusals
from fxq.runtime.cuda_graphs.refusals import CudaGraphError, check_module, device_of, label, refuse, too_many
from tests.toys import recipe, rows, toy

CPU = torch.device("cpu")


def quantized():
    return fxq.quantize(toy(), [rows(5, 96)], recipe(), progress=False)


def test_a_module_on_the_cpu_is_refused_when_graphs_are_made_of_it():
    for module in (quantized(), toy()):
        with pytest.raises(
            CudaGraphError, match=r"such as \S+, lies on cpu and CUDA graphs are of a GPU: move it with"
        ):
            fxq.CudaGraphs(module)


def test_a_function_has_to_say_where_it_runs():
    def double(x):
        return 2 * x

    with pytest.raises(CudaGraphError, match=r"double has no tensors that say where it runs: name the GPU, CudaGraphs"):
        fxq.CudaGraphs(double)
    with pytest.raises(CudaGraphError, match="double lies on cpu"):
        fxq.CudaGraphs(double, device="cpu")


def test_weights_on_two_devices_are_refused_and_a_number_on_the_cpu_is_none(monkeypatch):
    monkeypatch.setattr(refusals, "DEVICE", "meta")
    module = nn.Linear(2, 2, device="meta")
    module.register_buffer("count", torch.tensor(1))
    assert device_of(module, None) == torch.device("meta")
    module.register_buffer("table", torch.ones(2))
    with pytest.raises(CudaGraphError, match="Linear, such as table, lies on cpu"):
        device_of(module, None)
    monkeypatch.setattr(refusals, "DEVICE", "cuda")
    with pytest.raises(CudaGraphError, match="such as weight, lies on meta"):
        device_of(nn.Linear(2, 2, device="meta"), None)


def test_training_mode_is_refused_but_for_captured_graphs_which_have_none():
    with pytest.raises(CudaGraphError, match=r"Toy is in training mode.*call \.eval\(\)"):
        check_module(toy().train())
    check_module(toy())
    module = quantized()
    assert module.training
    check_module(module)


class Reads(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()


class Branches(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen.add_(x)
        return self.seen * 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Reads(), r"needs a value of the GPU on the host"),
        (Branches(), r"cond.* needs a value of the GPU on the host"),
        (Writes(), r"writes into .*seen.*, which a replayed graph would not do"),
    ],
)
def test_graphs_that_come_back_to_the_host_or_write_are_refused(module, message):
    captured = torch.export.export(module, (torch.randn(3),)).run_decompositions({}).module()
    with pytest.raises(CudaGraphError, match=message):
        check_module(captured)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.zeros(2, device="meta"), "input x lies on meta and the module on cpu: move it there"),
        (
            torch.zeros(2, requires_grad=True),
            "input x requires grad, and a replayed graph has no backward pass: detach",
        ),
        (torch.eye(2).to_sparse(), "input x is torch.sparse_coo: graphs read dense tensors"),
        (object(), "input x is of type object: graphs take tensors and constants, in lists, tuples and dicts"),
    ],
)
def test_inputs_that_no_graph_reads_are_named(leaf, message):
    assert not refusals.readable(leaf, CPU)
    with pytest.raises(CudaGraphError, match=message):
        refuse("x", leaf, CPU)


@pytest.mark.parametrize("leaf", [None, True, 3, 2.5, "text", torch.float32, torch.zeros(2), torch.zeros(())])
def test_tensors_and_constants_are_read(leaf):
    assert refusals.readable(leaf, CPU)


def test_inputs_have_the_names_of_the_signature():
    def function(x, caches, *others, flag=None):
        return x

    paths = torch.utils._pytree.tree_flatten_with_path(((1, [2, {"sink": 3}], 4, 5), {"flag": [6]}))[0]
    names = [label(function, path) for path, _ in paths]
    assert names == ["x", "caches[0]", "caches[1]['sink']", "args[2]", "args[3]", "flag[0]"]
    assert label(print, paths[0][0]) == "args[0]"
    assert len(set(names)) == len(names)


def test_what_varies_is_named_and_no_more_of_it_than_one_reads():
    captures = [{"x": "a", "k[0]": f"k{i}", "k[1]": f"k{i}", "k[2]": "k", "k[3]": f"k{i}"} for i in range(7)]
    text = str(too_many(captures, {**captures[0], "k[0]": "k9", "k[4]": "new"}, 7))
    assert text == (
        "7 graphs are captured, limit=7, and this call needs another one. What varies: k[0] (k3, k4, k5, k6, k9 and 3 "
        "more), k[1] (k2, k3, k4, k5, k6 and 2 more), k[3] (k2, k3, k4, k5, k6 and 2 more) and 1 more inputs. "
        "Raise the limit, give these inputs fewer shapes, or call the module itself"
    )
    assert "What varies: the number of inputs, or autocast." in str(too_many([{"x": "a"}], {"x": "a"}, 1))
