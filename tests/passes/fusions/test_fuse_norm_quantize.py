import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.core.graph import arguments
from fxq.core.layer import layers_reading, quantize_of, quantized_layers
from fxq.passes.fusions.fuse_norm_quantize import FuseNormQuantize
from fxq.passes.fusions.lay_out_weights import LayOutWeights
from fxq.passes.fusions.merge_linears import MergeLinears
from tests.passes.fusions.fusing import count, error, frozen, fused, recipe_of
from tests.toys import rows

WIDTH = 96


class Modulated(nn.Module):
    """A norm, its modulation in one of many forms, and linears."""

    def __init__(self, how, linears=1, affine=False):
        super().__init__()
        self.how = how
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5, elementwise_affine=affine)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, 33) for _ in range(linears))

    def forward(self, x, gain, shift):
        return sum(linear(self.modulate(x, gain, shift)) for linear in self.linears)

    def modulate(self, x, gain, shift):
        match self.how:
            case "plain":
                return self.norm(x)
            case "cast":
                affine = [None if p is None else p.float() for p in (self.norm.weight, self.norm.bias)]
                norm = F.layer_norm(x.float(), (WIDTH,), *affine)
                return (norm * (1 + gain.float()) + shift.float()).type_as(x)
            case "per frame":
                return (self.norm(x).unflatten(1, (gain.shape[1], -1)) * (gain + 1) + shift).flatten(1, 2)
            case "flat":
                return (self.norm(x) * (1 + gain) + shift).flatten(0, 1)
            case "swapped":
                return shift + (1 + gain) * self.norm(x)
            case "over two dimensions":
                return F.layer_norm(x, x.shape[1:]) * (1 + gain) + shift
            case "no one":
                return self.norm(x) * gain + shift
            case "no shift":
                return self.norm(x) * (1 + gain)
        return self.norm(x) * (1 + gain) + shift


class ReadTwice(Modulated):
    """The modulated value is also a result."""

    def forward(self, x, gain, shift):
        value = self.modulate(x, gain, shift)
        return self.linears[0](value) + value.mean()


class Shared(Modulated):
    """All linears read one modulated value."""

    def forward(self, x, gain, shift):
        value = self.modulate(x, gain, shift)
        return sum(linear(value) for linear in self.linears)


class Overwritten(Modulated):
    """The norm's input changes before the quantize reads the norm."""

    def forward(self, x, gain, shift):
        x = x * 2
        value = self.norm(x)
        x.add_(shift)
        return self.linears[0](value) + x.mean()


class Blocks(nn.Module):
    """A model whose only block is given; outliers are looked for in blocks."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, *args):
        return self.blocks[0](*args)


def inputs(gain=(2, 1, WIDTH), x=(2, 15, WIDTH), dtype=torch.float32, shift=None):
    made = rows(*x, seed=1), 0.3 * rows(*gain, seed=2), rows(*(shift or gain), seed=3)
    return tuple(tensor.to(dtype) for tensor in made)


FORMS = {
    "plain": ((2, 1, WIDTH), torch.float32),
    "per batch": ((2, 1, WIDTH), torch.float32),
    "per token": ((2, 15, WIDTH), torch.float32),
    "per frame": ((2, 3, 1, WIDTH), torch.float32),
    "swapped": ((2, 1, WIDTH), torch.float32),
    "cast": ((2, 1, WIDTH), torch.bfloat16),
}


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
def test_a_norm_its_modulation_and_the_quantize_become_one_operator(how, affine):
    gain, dtype = FORMS[how]
    args = inputs(gain, dtype=dtype)
    q = frozen(Modulated(how, affine=affine).to(dtype), args)
    graph = fused(q, FuseNormQuantize())
    assert count(graph, "fxq.norm_quantize") == 1
    assert count(graph, "fxq.quantize_act") == count(graph, "aten.layer_norm") == count(graph, "aten.mul") == 0
    assert error(graph, q, *args) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert graph.remarks == {"linears.0": ["quantize fused into its norm"]}
    assert graph.log[0][:2] == ("FuseNormQuantize", 1)


MEASURED = {"norm_quantize_per_token": {}, "norm_quantize_per_token_asymmetric": {"asymmetric": True}}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("how", FORMS)
def test_scales_per_token_are_measured_behind_the_norm(how, name):
    gain, dtype = FORMS[how]
    args = inputs(gain, dtype=dtype)
    q = frozen(Modulated(how, linears=2, affine=True).to(dtype), args, per_token=True, **MEASURED[name])
    graph = fused(q, FuseNormQuantize())
    assert count(graph, f"fxq.{name}") == 2 and count(graph, "fxq.dual_scale_linear_per_token") == 2
    assert (
        count(graph, name.replace("norm_", "fxq.")) == count(graph, "aten.layer_norm") == count(graph, "aten.mul") == 0
    )
    assert error(graph, q, *args) < (1e-2 if dtype == torch.float32 else 2e-2)
    assert graph.remarks == {f"linears.{i}": ["quantize fused into its norm"] for i in range(2)}


@pytest.mark.parametrize("name", MEASURED)
def test_merged_linears_share_one_norm_and_its_scales_per_token(name):
    model, args = Shared("per frame", linears=3), inputs((2, 3, 1, WIDTH))
    with torch.no_grad():
        for linear in model.linears:
            linear.weight[:, 3:35:4] *= 6
    q = frozen(Blocks(model), args, dual_scale=True, per_token=True, **MEASURED[name])
    graph = fused(q, MergeLinears(), FuseNormQuantize(), LayOutWeights())
    (node,) = (n for n in graph.module.graph.nodes if name in str(n.target))
    named = arguments(node)
    assert str(named["perm"].target).endswith("perm") and named["split"] == 64
    layers = [f"blocks.0.linears.{i}" for i in range(3)]
    assert layers_reading(node) == layers and quantize_of(next(quantized_layers(graph.module)).product) is node
    assert error(graph, q, *args) < 1e-2
    assert all(graph.remarks[layer][1] == "quantize fused into its norm" for layer in layers)
    assert not any("per token" in text for layer in layers for text in graph.remarks[layer])


@pytest.mark.parametrize("name", MEASURED)
def test_scales_per_token_behind_another_form_stay_with_the_reason(name):
    args = inputs()
    q = frozen(Modulated("no shift"), args, per_token=True, **MEASURED[name])
    graph = fused(q, FuseNormQuantize(), LayOutWeights())
    assert count(graph, f"fxq.{name}") == 0 and count(graph, name.replace("norm_", "fxq.")) == 1
    assert error(graph, q, *args) < 1e-6
    assert graph.remarks["linears.0"][:2] == [
        "quantize not fused into its norm: no shift is added to the product with its gain",
        "input scales are measured per token: quantize stays apart from what gives its input",
    ]


def test_a_perm_and_two_scales_go_with_the_quantize():
    model, args = Modulated("per batch"), inputs()
    with torch.no_grad():
        model.linears[0].weight[:, 3:35:4] *= 6
    q = frozen(Blocks(model), args, dual_scale=True)
    graph = fused(q, FuseNormQuantize())
    (node,) = (n for n in graph.module.graph.nodes if "norm_quantize" in str(n.target))
    assert str(node.args[6].target) == "blocks.0.linears.0.perm" and node.args[9] == 64
    assert error(graph, q, *args) < 1e-5


def test_every_quantize_of_one_norm_is_fused_and_reads_the_same_vectors():
    args = inputs((2, 3, 1, WIDTH))
    q = frozen(Modulated("per frame", linears=3), args)
    graph = fused(q, FuseNormQuantize())
    assert count(graph, "fxq.norm_quantize") == 3 and count(graph, "aten.squeeze") == 2 * 3
    assert error(graph, q, *args) < 1e-5


def test_another_batch_size_runs():
    q = frozen(Modulated("per batch"), inputs())
    args = inputs((5, 1, WIDTH), (5, 15, WIDTH))
    assert error(fused(q, FuseNormQuantize()), q, *args) < 1e-5


def test_another_number_of_frames_runs():
    auto, args = torch.export.Dim.AUTO, inputs((2, 3, 1, WIDTH))
    model = Modulated("per frame").eval()
    shapes = tuple({0: auto, 1: auto} for _ in args)
    q = fxq.quantize(model, [args], recipe_of(), dynamic_shapes=shapes, progress=False)
    graph = fused(q, FuseNormQuantize())
    assert count(graph, "fxq.norm_quantize") == 1, graph.remarks
    assert error(graph, q, *inputs((4, 5, 1, WIDTH), (4, 35, WIDTH))) < 1e-5


def test_a_write_after_the_norm_is_no_obstacle():
    q = frozen(Overwritten("plain"), inputs())
    graph = fused(q, FuseNormQuantize())
    assert count(graph, "fxq.norm_quantize") == 1, graph.remarks
    assert error(graph, q, *inputs()) < 1e-5


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (ReadTwice("per batch"), inputs(), r"add_1 is also read by mean"),
        (Modulated("over two dimensions"), inputs(), "it is over 2 dimensions"),
        (Modulated("no one"), inputs(), r"its gain is not of the form 1 \+ gain"),
        (Modulated("no shift"), inputs(), "no shift is added to the product with its gain"),
        (Modulated("gain per token"), inputs((2, 15, 1)), r"add is \[s\d+, 15, 1\]: expected \[s\d+, 1, 96\] or"),
        (
            Modulated("two"),
            inputs((2, 1, WIDTH), shift=(2, 15, WIDTH)),
            r"gain is \[s\d+, 1, 96\], shift \[s\d+, 15, 96\]",
        ),
        (Modulated("flat"), inputs(), r"what is quantized is \[15\*s\d+, 96\]: expected \[s\d+, 15, 96\]"),
        (Modulated("plain"), inputs(x=(15, WIDTH)), r"its input is \[s\d+, 96\]: expected \[B, S, K\]"),
        (Modulated("wide"), inputs((2, 5, 15, WIDTH), (15, WIDTH)), r"its input is \[15, 96\]: expected \[B, S, K\]"),
    ],
    ids=[
        "second reader",
        "two dimensions",
        "no one",
        "no shift",
        "gain",
        "shift",
        "flat",
        "two axes",
        "broadcast",
    ],
)
def test_what_is_not_of_the_form_stays_with_the_reason(model, args, reason):
    q = frozen(model, args)
    graph = fused(q, FuseNormQuantize())
    assert count(graph, "fxq.norm_quantize") == 0 and count(graph, "aten.layer_norm") == 1
    assert error(graph, q, *args) == 0
    (text,) = graph.remarks["linears.0"]
    assert text.startswith("quantize not fused into its norm: ")
    assert re.search(reason, text), text
