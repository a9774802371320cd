import dataclasses
import json

import pytest
import torch

import fxq
from fxq.core.config import Rule
from fxq.core.facts import Facts
from fxq.core.graph import graph_text
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from fxq.parallel import CAUSAL_WAN, DIFFUSERS_WAN, ParallelError, ShardPlan, ShardRule, load_shard, tensor_parallel
from fxq.parallel import tensor as parallel_tensor
from fxq.parallel.groups import Place
from fxq.parallel.shard_graph import ShardGraph
from fxq.parallel.tensor import ModuleSource
from tests.parallel import jobs
from tests.parallel.models import diffusers_call, diffusers_wan, wan
from tests.toys import recipe

FFN = ShardPlan((ShardRule("*.ffn.0", "column"), ShardRule("*.ffn.2", "row")))


def quantized(bits=8, kept=(), **scheme):
    rollout = wan()
    chosen = recipe(bits, **scheme)
    rules = tuple(Rule(pattern, None, "kept by the test") for pattern in kept)
    chosen = dataclasses.replace(chosen, rules=(*rules, *chosen.rules))
    return fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)


@pytest.fixture(scope="module")
def w4():
    return quantized(4)


@pytest.fixture(scope="module")
def folder(w4, tmp_path_factory):
    return fxq.save(w4, tmp_path_factory.mktemp("bundles") / "wan", fingerprint=False)


def distance(got, want):
    return float((got - want).norm() / want.norm())


IN_MEMORY, LOADED, OPTIMIZED = (jobs.from_memory,), (jobs.from_bundle, False), (jobs.from_bundle, True)
VARIANTS = {
    "W8": ({"bits": 8}, 1e-5, [IN_MEMORY]),
    "W4": ({"bits": 4}, 1e-5, [LOADED, OPTIMIZED]),
    "FFN in floats": ({"bits": 8, "kept": ("*.ffn.*",)}, 1e-5, [OPTIMIZED]),
    # A rank measures the scales of its own channels.
    "per token": ({"bits": 8, "per_token": True}, 0.01, [LOADED]),
    "asymmetric": ({"bits": 4, "per_token": True, "asymmetric": True}, 0.01, [LOADED]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=pytest.mark.sweep) if v in ("W8", "per token", "asymmetric", "FFN in floats") else v
        for v in VARIANTS
    ],
)
def test_the_ranks_together_make_the_video_of_one_process(variant, two_ranks, tmp_path):
    options, allowed, ways = VARIANTS[variant]
    module = quantized(**options)
    outliers = {row.layer: row.outliers for row in fxq.summary(module).rows}
    assert outliers["blocks.0.self_attn.q"] and outliers["blocks.0.self_attn.o"]
    want = jobs.video(wan(), module)
    folder = str(fxq.save(module, tmp_path / "bundle", fingerprint=False))
    for job, *args in ways:
        results = two_ranks.run(job, folder, *args)
        assert torch.equal(results[0]["latents"], results[1]["latents"])
        assert distance(results[0]["latents"], want["latents"]) < allowed
        for name in ("keys", "values"):
            got = [torch.cat(parts, dim=2) for parts in zip(*(result[name] for result in results), strict=True)]
            for one, other in zip(got, want[name], strict=True):
                assert distance(one, other) < allowed


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transformer_of_diffusers_is_split_as_well(dtype, two_ranks, tmp_path):
    pytest.importorskip("diffusers")
    model = diffusers_wan(dtype)
    module = fxq.quantize(model, [diffusers_call(dtype)], recipe(4), progress=False)
    (want,) = module(**diffusers_call(dtype))
    folder = str(fxq.save(module, tmp_path / "bundle"))
    results = two_ranks.run(jobs.diffusers_from_bundle, folder, dtype)
    assert torch.equal(*results)
    assert distance(results[0].double(), want.double()) < (1e-5 if dtype == "float32" else 0.02)


def test_a_rank_has_its_heads_its_part_of_norms_and_half_of_the_split_weights(folder, w4):
    state = load_shard(folder, CAUSAL_WAN, 1, 2).state_dict()
    whole = w4.state_dict()
    norm = "blocks.0.self_attn.norm_q.weight"
    assert torch.equal(state[norm], whole[norm][48:])
    for name in ("blocks.0.cross_attn.k.weight", "blocks.0.ffn.0.weight"):
        assert torch.equal(state[name], whole[name][len(whole[name]) // 2 :])
    assert torch.equal(state["blocks.0.modulation"], whole["blocks.0.modulation"])
    assert state["blocks.0.cross_attn.o.weight"].shape == (96, 32)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_bundle_and_a_module_in_memory_give_the_same_rank(folder, w4, rank):
    loaded = load_shard(folder, CAUSAL_WAN, rank, 2)
    graph = QuantGraph(w4, Stage.FROZEN).fork()
    run_passes(graph, (ShardGraph(CAUSAL_WAN, Place("0", rank, 2), ModuleSource(w4)),))
    torch.testing.assert_close(loaded.state_dict(), graph.module.state_dict(), rtol=0, atol=0)
    assert graph_text(loaded) == graph_text(graph.module)


def test_the_caches_have_the_heads_of_the_rank_and_any_batch_and_length(folder):
    facts = Facts.of(load_shard(folder, CAUSAL_WAN, 1, 2))
    assert facts.inputs[3:7] == [[None, None, 1, 48]] * 4
    assert (facts.parallel["rank"], facts.parallel["size"]) == (1, 2)


def test_plans_and_summary_show_the_rank(folder):
    rows = {row.layer: row for row in fxq.summary(load_shard(folder, CAUSAL_WAN, 0, 2)).rows}
    assert rows["blocks.0.ffn.0"].shape == (64, 96)
    assert rows["text_embedding.0"].shape == (96, 32)


class _Watched:
    """An open safetensors file that notes how many bytes of each tensor are read."""

    def __init__(self, file, name="", read=None):
        self.file, self.name, self.read = file, name, {} if read is None else read

    def __enter__(self):
        return _Watched(self.file.__enter__(), read=self.read)

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def get_slice(self, name):
        return _Watched(self.file.get_slice(name), name, self.read)

    def keys(self):
        return self.file.keys()

    def get_shape(self):
        return self.file.get_shape()

    def __getitem__(self, index):
        part = self.file[index]
        self.read[self.name] = self.read.get(self.name, 0) + part.nbytes
        return part


@pytest.mark.parametrize(("rank", "row"), [(0, 1.3), (1, 0.7)])
def test_a_rank_reads_its_part_of_split_weights_only(folder, w4, rank, row, monkeypatch):
    opened = []

    def watched(*args, **options):
        opened.append(_Watched(parallel_tensor.safe_open.__wrapped__(*args, **options)))
        return opened[-1]

    watched.__wrapped__ = parallel_tensor.safe_open
    monkeypatch.setattr(parallel_tensor, "safe_open", watched)
    load_shard(folder, CAUSAL_WAN, rank, 2, verify=False)
    read, whole = opened[0].read, w4.state_dict()
    # Of a row layer whole blocks of 32 channels are read, and the first rank reads the others' for its offset.
    for layer, share in (("self_attn.v", 0.5), ("ffn.0", 0.5), ("cross_attn.o", row)):
        name = f"blocks.0.{layer}.weight"
        assert read[name] / whole[name].nbytes == pytest.approx(share, abs=0.05), layer
    assert set(whole) - set(read) == {"blocks.0.ffn.2.perm", "blocks.0.self_attn.o.perm"}


@pytest.mark.parametrize(
    ("plan", "size", "reason"),
    [
        (CAUSAL_WAN, 4, r"layer blocks.0.\w+.[qkv]: its outputs, 2 parts \(heads\) in unflatten_\d+, .* 4 ranks"),
        (FFN, 3, r"layer blocks.0.ffn.0: its outputs \(128 channels\) cannot be split evenly over 3 ranks"),
        (
            ShardPlan((ShardRule("*.fnn.0", "column"),)),
            2,
            r"pattern '\*.fnn.0' matches no layer; close names: blocks.0.ffn.0",
        ),
        (
            ShardPlan(FFN.rules[:1]),
            2,
            'layer blocks.0.ffn.2 reads the split outputs of blocks.0.ffn.0: plan it as "row"',
        ),
        (ShardPlan(FFN.rules[1:]), 2, 'layer blocks.0.ffn.2 is planned as "row" but its input gelu_1 is whole'),
        (
            ShardPlan((ShardRule("head.head", "column"),)),
            2,
            r"layer head.head: flatten_\d+ joins its split outputs behind another dimension; replicate the layer",
        ),
        (
            ShardPlan((ShardRule("blocks.0.ffn.2", "column"),)),
            2,
            r"layer blocks.0.ffn.2: unflatten joins its split outputs",
        ),
        (
            ShardPlan((ShardRule("text_embedding.2", "column"),)),
            2,
            "layer blocks.0.cross_attn.k reads the split outputs",
        ),
    ],
    ids=["heads", "channels", "unknown pattern", "no row", "no column", "result", "residual", "text"],
)
def test_a_plan_that_does_not_fit_is_refused(folder, plan, size, reason):
    with pytest.raises(ParallelError, match=reason):
        load_shard(folder, plan, 0, size)


def test_unknown_ways_to_split_are_refused():
    with pytest.raises(ParallelError, match="'columns', expected one of column, row, replicate"):
        ShardRule("*", "columns")


def test_the_first_rule_that_matches_decides():
    plan = ShardPlan((ShardRule("a.b", "replicate"), ShardRule("a.*", "column"), ShardRule("*", "row", optional=True)))
    assert [plan.how(layer) for layer in ("a.b", "a.c", "d")] == ["replicate", "column", "row"]
    assert ShardPlan(()).how("a") == "replicate"


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_bundle_is_refused(folder, tmp_path, verify):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stored = copy / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(fxq.BundleError, match="truncated or altered" if verify else "cannot be read"):
        load_shard(copy, CAUSAL_WAN, 0, 2, verify=verify)


@pytest.mark.parametrize(("key", "value"), [("dtype", "int16"), ("shape", [1, 2])])
def test_tensors_that_are_not_those_of_the_manifest_are_refused(folder, tmp_path, key, value):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tensors"]["blocks.0.norm3.bias"][key] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        fxq.BundleError, match=r"tensors differ from the manifest: blocks.0.norm3.bias|norm3.bias .* the manifest says"
    ):
        load_shard(copy, CAUSAL_WAN, 0, 2)


def test_a_missing_file_is_named(folder, tmp_path):
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(fxq.BundleError, match=r"model.safetensors is missing; copy the whole folder"):
        load_shard(tmp_path, CAUSAL_WAN, 0, 2)


def test_without_a_process_group_it_says_how_to_start_one(w4):
    with pytest.raises(ParallelError, match="start the processes with torchrun"):
        tensor_parallel(w4, CAUSAL_WAN)


def test_optimized_and_split_modules_are_refused_and_so_is_saving(folder, w4, tmp_path):
    with pytest.raises(ParallelError, match="optimized already"):
        tensor_parallel(fxq.optimize(w4), CAUSAL_WAN)
    shard = load_shard(folder, CAUSAL_WAN, 0, 2)
    with pytest.raises(ParallelError, match="split over ranks already"):
        tensor_parallel(shard, CAUSAL_WAN)
    with pytest.raises(fxq.BundleError, match="all_reduce"):
        fxq.save(shard, tmp_path / "shard")


def test_the_preset_of_diffusers_names_the_linears_of_a_block():
    layers = {"blocks.3.attn1.to_q": "column", "blocks.3.attn2.to_out.0": "row", "blocks.3.ffn.net.0.proj": "column"}
    layers |= {"blocks.3.ffn.net.2": "row", "condition_embedder.time_proj": "replicate", "proj_out": "replicate"}
    assert {layer: DIFFUSERS_WAN.how(layer) for layer in layers} == layers


def test_a_bundle_with_weights_in_bit_planes_is_loaded_whole(tmp_path):
    q = quantized(6)
    fxq.save(q, tmp_path / "wan", fingerprint=False)
    with pytest.raises(ParallelError, match=r"weight of text_embedding\.0 is W6A8.*fxq\.load.*tensor_parallel"):
        load_shard(tmp_path / "wan", CAUSAL_WAN, 0, 2)
    place = Place("none", 0, 2)
    graph = QuantGraph.of(fxq.load(tmp_path / "wan"))
    run_passes(graph, (ShardGraph(CAUSAL_WAN, place, ModuleSource(graph.module)),))
    weight = graph.module.get_buffer("blocks.0.ffn.0.weight")
    assert weight.dtype == torch.int8 and int(weight.abs().max()) <= 32
