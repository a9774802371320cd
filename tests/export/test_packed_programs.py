"""Programs of graphs that read an encoded or absorbed cache: the same outputs, at every length of the cache."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fxq
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Klt, Prq
from fxq.cache.policy import CachePolicy
from fxq.calls.rules import InputError
from fxq.export.capture import CACHE, ExportError, lower
from fxq.export.program import export_program, load_program, read_program
from fxq.passes import absorb_cache, pack_cache
from fxq.passes.match.cache_inputs import TABLES, TakesCache, held_tables
from tests.toys import wan_rollout

POLICY = CachePolicy(keys=Klt(1.0, fit="model"), values=Prq(1, 8, block=32), span=1)
ABSORBING = CachePolicy(window=8, sink=2, absorb=Absorb(warmup=4, most=1.0, ratio=1.0))


def rollout_with(policy, frames=10):
    rollout = wan_rollout(frames=frames)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return rollout


@pytest.fixture(scope="module")
def quantized():
    rollout = wan_rollout()
    return fxq.quantize(rollout.denoiser, rollout, "w8a8-dynamic", progress=False)


@pytest.fixture(scope="module")
def packed():
    rollout = wan_rollout()
    chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=POLICY)
    return fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)


@pytest.fixture(scope="module")
def compiled(packed, tmp_path_factory):
    return export_program(packed, tmp_path_factory.mktemp("programs") / "aoti", aoti=True)


def calls_of(module, rollout):
    """Arguments and results of every call of a video."""
    seen = []

    def keep(*args):
        seen.append((args, module(*args)))
        return seen[-1][1]

    keep._orig_mod = module
    with rollout.using(keep):
        rollout.rollout(*rollout.batches[0])
    return seen


def off(got, want):
    return float((got - want).norm() / want.norm())


def test_a_weight_free_program_of_a_packed_graph_takes_a_cache_of_any_length(packed, tmp_path):
    folder = export_program(packed, tmp_path / "program")
    program = torch.export.load(folder / "program.pt2")
    module = program.module()
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    loaded, spans = load_program(folder), set()
    for args, want in calls_of(packed, rollout_with(POLICY)):
        spans.add(args[5][0]["packed"]["planes"].shape[1])
        for run in (module, loaded):
            assert torch.equal(run(*args)[0], want[0])
    assert spans == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="packed_k are 3 spans of 12 tokens, cos has 7"):
        module(*args[:9], args[9][:7], args[10][:7])


@pytest.mark.slow
def test_a_weight_free_program_of_an_absorbed_graph_is_the_graph(quantized, tmp_path):
    forgetting = absorb_cache(quantized, ABSORBING)
    folder = export_program(forgetting, tmp_path / "program")
    rollout = rollout_with(ABSORBING, frames=14)
    want = []
    for module in (forgetting, load_program(folder)):
        with rollout.using(module):
            want.append(rollout.rollout(*rollout.batches[0]))
    assert torch.equal(*want)


def test_formats_of_torch_s_operators_alone_name_the_cache(packed):
    with pytest.raises(ExportError, match=r"attention_packed.* reads an encoded or absorbed cache"):
        lower(packed)
    kept = {n.target for n in lower(packed, keeps=CACHE).module.graph.nodes if str(n.target).startswith("fxq.")}
    assert kept and kept <= CACHE


@pytest.mark.sweep
def test_a_compiled_program_drives_a_rollout_on_its_own_tables(packed, compiled):
    run, rollout = load_program(compiled), rollout_with(POLICY)
    assert read_program(compiled)["imports"] == ["torch", "fxq"]
    assert sorted(file.name for file in compiled.iterdir()) == ["cache.safetensors", "program.json", "program.pt2"]
    held = held_tables(run, POLICY, 1, (2, 32))
    assert held[0][0]["basis"].equal(held_tables(packed, POLICY, 1, (2, 32))[0][0]["basis"])
    for args, want in calls_of(packed, rollout):
        assert off(run(*args)[0], want[0]) < 1e-3
    with rollout.using(run):
        got = rollout.rollout(*rollout.batches[0])
    with rollout.using(packed):
        assert off(got, rollout.rollout(*rollout.batches[0])) < 0.02
    other = rollout_with(CachePolicy())
    with other.using(run), pytest.raises(ValueError, match="was packed for a cache of"):
        other.rollout(*other.batches[0])


@pytest.mark.sweep
def test_a_compiled_program_compares_every_call_with_what_it_takes(packed, compiled, tmp_path):
    run = load_program(compiled)
    args, _ = calls_of(packed, rollout_with(POLICY))[-1]
    planes = args[5][0]["packed"]["planes"]

    def called(**packed):
        run(*args[:5], [{**args[5][0], "packed": packed}], *args[6:])

    with pytest.raises(InputError, match=r"planes has shape .*, the graph was captured for"):
        called(planes=planes[:, :, :-1])
    with pytest.raises(InputError, match="nested in another way"):
        called(planes=planes, basis=planes)
    with pytest.raises(RuntimeError, match="spans of 12 tokens, cos has 36"):
        called(planes=planes[:, :1])
    folder = shutil.copytree(compiled, tmp_path / "other")
    (folder / "cache.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ExportError, match=r"cache.safetensors does not have the hash"):
        load_program(folder)
    facts = json.loads((folder / "program.json").read_text())
    facts["files"]["cache.safetensors"] = hashlib.sha256(b"\0" * 64).hexdigest()
    (folder / "program.json").write_text(json.dumps(facts))
    with pytest.raises(ExportError, match=r"cache.safetensors cannot be read"):
        load_program(folder)


@pytest.mark.sweep
def test_a_compiled_program_goes_on_where_layers_are_absorbed(quantized, tmp_path):
    forgetting = absorb_cache(quantized, ABSORBING)
    run = load_program(export_program(forgetting, tmp_path / "aoti", aoti=True))
    rollout = rollout_with(ABSORBING, frames=14)
    state = rollout.begin(*rollout.batches[0])
    with rollout.using(forgetting):
        while not state.absorption.verdicts:
            state = rollout.advance(state)
        want = rollout.advance(rollout.fork(state)).latents
    with rollout.using(run):
        assert off(rollout.advance(state).latents, want) < 0.02
        with pytest.raises(ValueError, match=r"is of the warm-up, .* run the bundle's module until then"):
            rollout.rollout(*rollout.batches[0])


def test_what_a_program_takes_of_a_cache_is_read_off_its_graph(quantized, packed):
    bare = TakesCache.of(pack_cache(quantized, CachePolicy(keys=Klt(1.0), span=1)))
    assert bare.arguments == TABLES and bare.packing.spans == (12,) and not bare.tables
    assert set(TakesCache.of(packed).tables) == {f"keys.0.{name}" for name in ("mean", "basis", "step", "width")}
    assert TakesCache.of(quantized) == TakesCache()
    assert TakesCache.of(absorb_cache(quantized, ABSORBING)).arguments == ("absorb_maps",)
