"""Attentions in integers: which they are, what is said of them, and their way through a bundle."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import fxq
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Int8Attention, PerToken
from fxq.cache.policy import CachePolicy
from fxq.calibration.collect import CalibrationError
from fxq.cli import app
from fxq.core.facts import ChosenAttentions, Facts
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph
from fxq.core.method import AttentionScheme, RecipeError
from fxq.core.pipeline import PassError, run_passes
from fxq.export.capture import INTEGERS, ExportError, lower
from fxq.kernels.attention.codecs import codecs_of
from fxq.lab import Lab
from fxq.passes import absorb_cache, pack_cache
from fxq.passes.match.cache_inputs import Packing
from fxq.passes.measured import exact_where_faster, float_where_faster
from fxq.passes.quantize_attention import QuantizeAttention
from fxq.runtime.progress import Progress
from tests.attacks.corpus import edit_json, first
from tests.passes.fusions.fusing import recipe_of
from tests.toys import recipe, rows, wan_rollout

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE


class Attend(nn.Module):
    """Attention to a cache and to itself, with a linear behind it."""

    def __init__(self, mask=False):
        super().__init__()
        self.mask = mask
        self.o = nn.Linear(WIDTH, 33)

    def forward(self, x, keys, values):
        q = x.unflatten(2, (HEADS, SIZE))
        k, v = torch.cat((keys, -q), 1), torch.cat((values, q), 1)
        mask = q.new_zeros(q.shape[1], k.shape[1]) if self.mask else None
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))


class Two(nn.Module):
    """Two attentions: a channel of the second's keys is so large that 8 bits leave nothing of the others."""

    def __init__(self, *models):
        super().__init__()
        self.near, self.far = models or (Attend(), Attend())
        gain = torch.ones(HEADS, SIZE)
        gain[:, 3] = 200.0
        self.register_buffer("gain", gain)

    def forward(self, x, keys, values):
        return self.near(x, keys, values), self.far(x / self.gain.flatten(), keys * self.gain, values)


def inputs(seed=0):
    return tuple(
        rows(2, *shape, seed=seed + i) for i, shape in enumerate([(9, WIDTH), (40, HEADS, SIZE), (40, HEADS, SIZE)])
    )


def quantized(model=None, **scheme):
    torch.manual_seed(0)
    chosen = dataclasses.replace(recipe_of(), attention=AttentionScheme(**scheme))
    return fxq.quantize((model or Two()).eval(), [inputs(), inputs(5)], chosen, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized module, and its bundle."""
    module = quantized(max_error=0.05)
    return module, fxq.save(module, tmp_path_factory.mktemp("attention") / "bundle")


def chosen_of(module):
    return {layer.place: layer for layer in ChosenAttentions.of(Facts.of(module).others).layers}


def count(module, name):
    return sum(node.op == "call_function" and name in str(node.target) for node in module.graph.nodes)


def test_an_attention_is_in_integers_where_its_error_allows_it(made):
    module = made[0]
    near, far = (chosen_of(module)[name] for name in ("near.o", "far.o"))
    assert near.error < 0.03 and not near.reason
    assert far.error > 0.05 and far.reason == f"an error of {far.error:.2%}, more than 5.00%"
    assert count(module, "fxq.attention_int8") == count(module, "scaled_dot_product_attention") == 1
    node = next(n for n in module.graph.nodes if "attention_int8" in str(n.target))
    assert len(node.args[1]) == len(node.args[2]) == 2, "the cache is read where it lies"
    exact = quantized(keep=("*",))
    assert count(exact, "fxq.attention_int8") == 0
    assert {layer.reason for layer in chosen_of(exact).values()} == {"the recipe keeps it"}
    for got, want, limit in zip(module(*inputs()), exact(*inputs()), (0.03, 1e-6), strict=True):
        assert float((got - want).norm() / want.norm()) < limit


def test_the_measured_error_is_that_of_the_operator():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.o = nn.Linear(WIDTH, WIDTH)
            nn.init.eye_(self.o.weight), nn.init.zeros_(self.o.bias)

        def forward(self, x):
            q = x.unflatten(2, (HEADS, SIZE)).transpose(1, 2)
            return self.o(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))

    data, noise, signal = [rows(2, 70, WIDTH, seed=s) for s in (1, 2)], 0.0, 0.0
    for x in data:
        q = x.unflatten(2, (HEADS, SIZE))
        heads = q.double().transpose(1, 2)
        want = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        noise += float((fxq.kernels.attention_int8(q, [q], [q]) - want).square().sum())
        signal += float(want.square().sum())
    chosen = dataclasses.replace(recipe_of(), attention=AttentionScheme())
    module = fxq.quantize(Heads().eval(), data, chosen, progress=False)
    (layer,) = ChosenAttentions.of(Facts.of(module).others).layers
    assert layer.error == pytest.approx((noise / signal) ** 0.5, rel=1e-3)


def test_an_attention_that_the_operator_does_not_have_stays_exact_with_the_reason():
    layers = chosen_of(quantized(Two(Attend(), Attend(mask=True))))
    assert not layers["near.o"].reason and layers["far.o"].error is None
    assert layers["far.o"].reason == "no error was measured: it has a mask, or no calibration call has reached it"


def test_the_summary_and_the_bundle_tell_what_was_chosen(made):
    module, folder = made
    text = str(fxq.summary(module))
    assert f"int8 attention: 1 of 2 ({fxq.kernels.used('attention_int8', 'cpu')}), error" in text
    assert "exact attention: far.o: an error of" in text
    assert json.loads(fxq.summary(module).to_json())["facts"]["attention"]["layers"][0]["place"] == "near.o"
    loaded = fxq.load(folder)
    assert str(fxq.summary(loaded)) == text
    for one, other in zip(loaded(*inputs()), module(*inputs()), strict=True):
        assert torch.equal(one, other)
    fast = fxq.optimize(loaded)
    assert "int8 attention: 1 of 2" in str(fxq.summary(fast)) and count(fast, "fxq.attention_int8") == 1
    assert count(fast, "fxq.attention.default") == 1, "the other one is fused as ever"
    for one, other in zip(fast(*inputs()), module(*inputs()), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node["args"].pop(),
        lambda node: node["args"].__setitem__(1, 7),
        lambda node: node["args"].__setitem__(2, {"list": []}),
        lambda node: node["args"][1]["list"].reverse(),
        lambda node: node["kwargs"].update(scale=1.0),
    ],
    ids=["none", "number", "empty", "other order", "keyword"],
)
def test_a_bundle_with_other_arguments_is_refused(change, made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "bundle")
    edit_json(folder, "graph.json", lambda data: change(first(data, "attention_int8")))
    with pytest.raises(fxq.BundleError):
        fxq.load(folder)


@pytest.mark.parametrize(
    "attention",
    [
        7,
        {"scheme": "int8"},
        {"scheme": "int8", "max_error": 0.1, "layers": [{"place": "a\x1b[2J", "error": 0.1, "reason": ""}]},
        {"scheme": "int8", "max_error": 0.1, "layers": [{"place": "a", "error": "x", "reason": ""}]},
    ],
)
def test_facts_of_another_form_are_refused(attention, made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "bundle")
    edit_json(folder, "manifest.json", lambda data: data["facts"].update(attention=attention))
    with pytest.raises(fxq.BundleError, match="attention"):
        fxq.load(folder)


def test_without_data_there_is_no_error_to_choose_by():
    chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], attention=AttentionScheme())
    with pytest.raises(
        CalibrationError, match="attention = 'int8', and which attentions it is for is measured on data"
    ):
        fxq.quantize(Two().eval(), None, chosen, example_inputs=inputs(), progress=False)


def test_gradients_do_not_keep_errors_from_being_measured():
    chosen = dataclasses.replace(recipe_of(), attention=AttentionScheme(), weighting="gradient")
    module = fxq.quantize(Two().eval(), [inputs()], chosen, progress=False)
    assert all(layer.error is not None for layer in chosen_of(module).values())


def test_a_rollout_and_its_caches():
    """Attention to a growing cache and to a text; a packed cache is refused, before and after."""
    source = wan_rollout()
    chosen = dataclasses.replace(recipe(), attention=AttentionScheme())
    module = fxq.quantize(source.denoiser, source, chosen, progress=False)
    layers = ChosenAttentions.of(Facts.of(module).others).layers
    assert [layer.place for layer in layers] == ["blocks.0.self_attn.o", "blocks.0.cross_attn.o"]
    assert not any(layer.reason for layer in layers) and all(0 < layer.error < 0.02 for layer in layers)
    policy = CachePolicy(keys=PerToken(8, 16), values=PerToken(8, 16), span=1)
    with pytest.raises(PassError, match="its attentions multiply 8-bit integers and read keys and values as they are"):
        pack_cache(module, policy)
    with pytest.raises(RecipeError, match="attention = 'int8' with a cache that is encoded or absorbed"):
        dataclasses.replace(chosen, cache=policy)
    assert dataclasses.replace(chosen, cache=CachePolicy(window=4)).attention == AttentionScheme()
    left = {str(node.target) for node in lower(module, keeps=INTEGERS).module.graph.nodes if "fxq" in str(node.target)}
    assert left == {"fxq.attention_int8.default"}, "what is compiled ahead of time calls the operator"
    with pytest.raises(ExportError, match="is attention in 8-bit integers, which this format has no operator for"):
        lower(module)


CODED = CachePolicy(keys=Int8Attention(), values=Int8Attention(), span=1)


def packed_calls(module):
    """Codecs of each attention to an encoded cache: whether they are multiplied as they lie."""
    calls = [n for n in module.graph.nodes if n.op == "call_function" and "attention_packed" in str(n.target)]
    return [codecs_of(arguments(node)["codec"])[0].integers for node in calls]


def latents(source, module, policy, chunks=None):
    source.sampler = dataclasses.replace(source.sampler, cache=policy)
    with source.using(module), torch.no_grad():
        return source.rollout(*source.batches[0], upto=chunks)


def test_what_is_stored_is_multiplied_as_it_lies(tmp_path):
    source = wan_rollout(frames=8)
    chosen = dataclasses.replace(recipe(), attention=AttentionScheme(), cache=CODED)
    module = fxq.quantize(source.denoiser, source, chosen, progress=False)
    assert packed_calls(module) == [True] and count(module, "fxq.attention_int8") == 1, "the text's is as it was"
    assert Packing.of(module) == Packing.for_cache(CODED, 1, 12)
    assert "int8 attention: 2 of 2" in str(fxq.summary(module))
    got = latents(source, module, CODED)
    plain = fxq.quantize(source.denoiser, source, dataclasses.replace(chosen, cache=None), progress=False)
    exact = latents(source, source.denoiser, CachePolicy())
    limit = 1.3 * float((latents(source, plain, CachePolicy()) - exact).norm())
    assert 0 < float((got - exact).norm()) < limit
    loaded = fxq.load(fxq.save(module, tmp_path / "b"))
    assert torch.equal(latents(source, loaded, CODED), got)
    fast = fxq.optimize(loaded)
    assert packed_calls(fast) == [True] and "int8 attention: 2 of 2 (" in str(fxq.summary(fast))
    assert float((latents(source, fast, CODED) - exact).norm()) < limit


def test_a_call_on_stored_integers_is_that_on_the_floats_they_were_made_of():
    """The second chunk attends to one span and itself: the dense cache has the same two pieces."""
    source = wan_rollout()
    module = fxq.quantize(
        source.denoiser, source, dataclasses.replace(recipe(), attention=AttentionScheme()), progress=False
    )
    policy = dataclasses.replace(CODED, recent=0)
    found = [
        latents(source, made, kept, 2) for made, kept in ((pack_cache(module, policy), policy), (module, CachePolicy()))
    ]
    assert torch.equal(found[0][:, :2], found[1][:, :2])
    assert float((found[0] - found[1]).abs().max() / found[1].abs().max()) < 1e-4


def test_an_attention_that_stays_exact_reads_the_numbers():
    source = wan_rollout()
    kept = dataclasses.replace(recipe(), attention=AttentionScheme(keep=("*self_attn*",)), cache=CODED)
    module = fxq.quantize(source.denoiser, source, kept, progress=False)
    assert packed_calls(module) == [False] and Packing.of(module) == Packing.for_cache(CODED, 1, 12)
    exact = latents(source, source.denoiser, CachePolicy())
    assert float((latents(source, module, CODED) - exact).norm() / exact.norm()) < 0.1


def test_what_cannot_be_stored_so_is_refused():
    source = wan_rollout()
    chosen = dataclasses.replace(recipe(), attention=AttentionScheme())
    with pytest.raises(ValueError, match="'relative' moves keys, and codec int8_attention stores them rotated"):
        CachePolicy(window=8, positions="relative", keys=Int8Attention(), span=1)
    for cache in (
        dataclasses.replace(CODED, values=None),
        dataclasses.replace(CODED, keys=PerToken(8, 16)),
        dataclasses.replace(CODED, keys=(Int8Attention(), None)),
        dataclasses.replace(CODED, absorb=Absorb(), window=12, sink=2),
    ):
        with pytest.raises(RecipeError, match="or as codec int8_attention stores both"):
            dataclasses.replace(chosen, cache=cache)
    module = fxq.quantize(source.denoiser, source, dataclasses.replace(chosen, cache=CODED), progress=False)
    absorbing = CachePolicy(window=12, sink=2, absorb=Absorb())
    with pytest.raises(PassError, match="store both by codec int8_attention without absorbed layers"):
        absorb_cache(module, absorbing)


def test_many_recipes_on_one_calibration_choose_attentions_too():
    source = wan_rollout()
    plain, attention = recipe(), dataclasses.replace(recipe(), attention=AttentionScheme())
    lab = Lab(source, plain, Progress(False))
    modules = [lab.quantized(chosen, chosen)[0] for chosen in (plain, attention)]
    assert [count(module, "fxq.attention_int8") for module in modules] == [0, 2]
    assert "attention" not in Facts.of(modules[0]).others and len(chosen_of(modules[1])) == 2


def test_float8_values_are_another_scheme_with_errors_of_its_own(made, tmp_path, monkeypatch):
    monkeypatch.setattr(exact_where_faster, "_measured", lambda size: (0.002, 0.001))
    monkeypatch.setattr(float_where_faster, "_measured", lambda *given: (0.001, 0.002))
    module = quantized(scheme="int8_fp8", max_error=0.06)
    near, far = (chosen_of(module)[name] for name in ("near.o", "far.o"))
    assert not near.reason and far.reason and chosen_of(made[0])["near.o"].error < near.error < 0.06
    assert count(module, "fxq.attention_int8_fp8") == 1 and count(module, "fxq.attention_int8.") == 0
    assert "int8_fp8 attention: 1 of 2 (reference), error" in str(fxq.summary(module))
    loaded = fxq.load(fxq.save(module, tmp_path / "b"))
    for one, other in zip(loaded(*inputs()), module(*inputs()), strict=True):
        assert torch.equal(one, other)
    exact = fxq.optimize(loaded, floats_where_faster=True)
    assert count(exact, "fxq.attention_int8_fp8") == 0 and count(exact, "fxq.attention.default") == 2
    assert "1 ms exact, 2 ms in 8 bits, as measured here" in chosen_of(exact)["near.o"].reason
    assert count(fxq.optimize(loaded, floats_where_faster=False), "fxq.attention_int8_fp8") == 1


def test_what_is_measured_once_is_measured_for_each_scheme():
    source = wan_rollout()
    lab = Lab(source, recipe(), Progress(False))
    schemes = [dataclasses.replace(recipe(), attention=AttentionScheme(scheme=s)) for s in ("int8", "int8_fp8")]
    found = [chosen_of(lab.quantized(chosen, chosen)[0]) for chosen in schemes]
    assert all(found[0][place].error < found[1][place].error for place in found[0])


def test_no_cache_stores_values_of_float8():
    source = wan_rollout()
    chosen = dataclasses.replace(recipe(), attention=AttentionScheme(scheme="int8_fp8"))
    for cache in (CODED, CachePolicy(keys=PerToken(8, 16), span=1), CachePolicy(absorb=Absorb(), window=12, sink=2)):
        with pytest.raises(RecipeError, match=r"attention = 'int8_fp8' .* no codec stores what it multiplies"):
            dataclasses.replace(chosen, cache=cache)
    module = fxq.quantize(source.denoiser, source, chosen, progress=False)
    assert count(module, "fxq.attention_int8_fp8") == 2
    with pytest.raises(PassError, match="its attentions multiply values in float8 and read them as they are"):
        pack_cache(module, CODED)


def test_the_pass_runs_once(made):
    graph = QuantGraph.of(fxq.optimize(made[0]))
    with pytest.raises(PassError, match="QuantizeAttention gives a FROZEN graph, this one is BOUND already"):
        run_passes(graph, (QuantizeAttention(AttentionScheme(), {}),))


def test_the_command_takes_the_scheme(tmp_path):
    done = CliRunner().invoke(app, ["quantize", "--out", str(tmp_path / "b"), "--attention", "fp4"])
    assert done.exit_code and "expected int8" in done.output + str(done.exception)
