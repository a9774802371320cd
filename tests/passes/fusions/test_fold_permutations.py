import pytest
import torch
from torch import nn

import fxq
from fxq.core.ir import QuantGraph, Stage, get_tensor
from fxq.core.pipeline import run_passes
from fxq.passes.fusions.fold_permutations import FoldPermutations
from fxq.passes.fusions.merge_linears import MergeLinears
from tests.passes.fusions.test_merge_linears import QUANTIZE, calls
from tests.toys import recipe, rows, wan_rollout


class Mlp(nn.Module):
    """Producers and readers of a hidden axis of 96 with eight outlier channels; ``how`` says what else reads it."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        names = ("up", "gate", "down", "side")
        sizes = ((33, 96), (33, 96), (96, 17), (96, 9))
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(*s) for n, s in zip(names, sizes, strict=True)})])
        with torch.no_grad():
            self.blocks[0]["down"].weight[:, 3:35:4] *= 6
            self.blocks[0]["side"].weight[:, 5:80:9] *= 6

    def forward(self, x):
        up, gate, down, side = (self.blocks[0][name] for name in ("up", "gate", "down", "side"))
        h = torch.nn.functional.gelu(up(x)) * gate(x)
        if self.how == "returned":
            return down(h), h
        if self.how == "two readers":
            return down(h), side(h)
        if self.how == "other order":
            return down(h), side(h * 2)
        return (down(h),)


def frozen(how="", bits=8, float_up=False):
    torch.manual_seed(1)
    x, chosen = rows(2, 9, 33), recipe(bits)
    kept = (fxq.Rule("*.up", None, "kept float"),) if float_up else ()
    # 33 inputs do not pack into 4 bits: those layers stay float there.
    chosen = fxq.Recipe(name="t", rules=(*kept, *chosen.rules), methods=chosen.methods, weighting="uniform")
    module = fxq.quantize(Mlp(how).eval(), [x], chosen, progress=False)
    return module, QuantGraph(module, Stage.FROZEN).fork(), x


def perms(graph):
    return [node.args[1] is not None for node in graph.module.graph.nodes if node.target == QUANTIZE]


@pytest.mark.parametrize("float_up", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "passes", [(FoldPermutations,), (MergeLinears, FoldPermutations), (FoldPermutations, MergeLinears)], ids=len
)
def test_the_order_of_a_hidden_axis_moves_into_its_producers(bits, float_up, passes):
    module, graph, x = frozen(bits=bits, float_up=float_up)
    assert sum(perms(graph)) == 1 and len(get_tensor(module, "blocks.0.down.perm")) == 96
    run_passes(graph, [step() for step in passes])
    assert not any(perms(graph)) and not [n for n, _ in graph.module.named_buffers() if "perm" in n]
    for batch in (x, rows(4, 9, 33, seed=8)):
        assert all(map(torch.equal, module(batch), graph.module(batch)))
    remark = graph.remarks["blocks.0.down"][-1]
    assert remark.startswith("channel order folded into blocks.0.")


def test_the_module_it_was_made_from_keeps_its_tensors():
    module, graph, x = frozen()
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    want = module(x)
    run_passes(graph, (FoldPermutations(),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())
    assert all(map(torch.equal, module(x), want))


@pytest.mark.parametrize(
    ("how", "layer", "reason"),
    [
        ("returned", "blocks.0.down", r"the order of its input is fixed: mul is a result of the model"),
        ("other order", "blocks.0.down", r"the order of its input is shared by blocks.0.side"),
        ("other order", "blocks.0.side", r"the order of its input is shared by blocks.0.down"),
    ],
)
def test_an_order_that_others_read_is_left_with_the_reason(how, layer, reason):
    module, graph, x = frozen(how)
    gathers = sum(perms(graph))
    run_passes(graph, (FoldPermutations(),))
    assert sum(perms(graph)) == gathers
    assert all(map(torch.equal, module(x), graph.module(x)))
    assert graph.remarks[layer] == [f"its quantize gathers channels: {reason}"]


@pytest.mark.parametrize("merge", [False, True])
def test_readers_that_want_one_order_get_it(merge):
    module, graph, x = frozen("two readers")
    assert sum(perms(graph)) == 2
    run_passes(graph, (MergeLinears(), FoldPermutations()) if merge else (FoldPermutations(),))
    assert not any(perms(graph))
    assert all(map(torch.equal, module(x), graph.module(x)))
    producers = "blocks.0.up_gate" if merge else "blocks.0.up, blocks.0.gate"
    assert graph.remarks["blocks.0.side"][-1] == f"channel order folded into {producers}"


def test_a_second_run_finds_nothing_to_do():
    _, graph, _ = frozen()
    run_passes(graph, (FoldPermutations(), FoldPermutations()))
    assert [touched for _, touched, _ in graph.log] == [1, 0]


def outlying(rollout):
    """Outlier channels for every kind of layer of a rollout's model."""
    block = rollout.denoiser.blocks[0]
    with torch.no_grad():
        for layer, start in (
            (block.self_attn.o, 1),
            (block.cross_attn.q, 2),
            (block.cross_attn.k, 3),
            (block.ffn[2], 4),
        ):
            layer.weight[:, start:60:7] *= 8
    return rollout


@pytest.mark.parametrize("first", [FoldPermutations, MergeLinears])
def test_a_rollout_is_bit_equal_and_says_what_was_folded(first):
    rollout = outlying(wan_rollout(seeds=(1,)))
    module = fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False)
    graph = QuantGraph(module, Stage.FROZEN).fork()
    both = (FoldPermutations(), MergeLinears())
    run_passes(graph, both if first is FoldPermutations else both[::-1])
    assert torch.equal(calls(rollout, module), calls(rollout, graph.module))
    last = {layer: [t for t in texts if "GEMM" not in t] for layer, texts in graph.remarks.items()}
    gathers = "its quantize gathers channels: the order of its input is"
    assert last["blocks.0.ffn.2"] == ["channel order folded into blocks.0.ffn.0"]
    assert last["blocks.0.cross_attn.k"][0] == "channel order folded into text_embedding.2"
    assert last["blocks.0.cross_attn.q"][0].startswith(f"{gathers} shared by blocks.0.self_attn.q")
    assert last["blocks.0.self_attn.o"][0].startswith(f"{gathers} fixed: flatten_")
    assert last["blocks.0.self_attn.q"][0].startswith(f"{gathers} shared by blocks.0.cross_attn.q")
