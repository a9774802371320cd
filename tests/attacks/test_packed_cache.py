"""A bundle whose graph reads an encoded cache: texts of codecs and sizes that a stranger chose."""

import dataclasses
import json
import shutil

import pytest
import torch

import fxq
from fxq.cache.codecs import Klt, PerToken
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_to_json
from fxq.calibration.rollout import Draws
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes import pack_cache
from tests.attacks.corpus import edit_json, edit_tensors, first
from tests.toys import wan_rollout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = CausalWanConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=16, text_dim=8, text_len=4, in_dim=3, out_dim=3
    )
    torch.manual_seed(0)
    model, codec = CausalWan(config).eval(), PerToken(8, 12, scale_dtype="bfloat16")
    policy = CachePolicy(keys=codec, values=codec, span=1)
    batch = ({"prompt_embeds": torch.randn(1, 4, 8)}, Draws([1], (6, 3, 4, 4)))
    rollout = SelfForcingRollout(model, [batch], SamplerConfig(cache=policy))
    module = pack_cache(fxq.quantize(model, rollout, "w8a8-dynamic", progress=False), policy)
    return fxq.save(module, tmp_path_factory.mktemp("packed") / "bundle")


@pytest.fixture
def packed(made, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


POLICY = CachePolicy(keys=Klt(1.0, fit="model"), values=Klt(2.0, fit="model"), span=1)


@pytest.fixture(scope="module")
def made_with_tables(tmp_path_factory):
    source = wan_rollout()
    chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=POLICY)
    module = fxq.quantize(source.denoiser, source, chosen, progress=False)
    return fxq.save(module, tmp_path_factory.mktemp("tables") / "bundle")


@pytest.fixture
def tables(made_with_tables, tmp_path):
    return shutil.copytree(made_with_tables, tmp_path / "tables")


BASIS, WIDTH, STEP = (f"cache_tables.keys.0.{name}" for name in ("basis", "width", "step"))
VALUES = {
    "no planes": lambda t: t[WIDTH].zero_(),
    "planes beyond those stored": lambda t: t[WIDTH].fill_(8),
    "wide coefficients": lambda t: t[WIDTH].copy_(torch.tensor([[64] + [0] * 31, [0] * 32])),
    "a basis of NaN": lambda t: t[BASIS].fill_(torch.nan),
    "steps below zero": lambda t: t[STEP].neg_(),
    "another dtype": lambda t: t.update({BASIS: t[BASIS].float()}),
    "another size": lambda t: t.update({BASIS: t[BASIS][:, :, :5].contiguous()}),
    "a flat one": lambda t: t.update({BASIS: t[BASIS].flatten()}),
    "none": lambda t: t.pop(STEP),
}


@pytest.mark.parametrize("name", VALUES)
def test_tables_that_codecs_cannot_work_with_are_refused(tables, name):
    edit_tensors(tables, VALUES[name])
    with pytest.raises(fxq.BundleError):
        fxq.load(tables)


def test_tables_that_are_computed_are_refused(tables):
    def change(data):
        node = first(data, "attention_packed")
        place = next(i for i, arg in enumerate(node["args"][3]["list"]) if "basis" in arg.get("node", ""))
        made = {"name": "made", "op": "call_function", "target": "aten.neg.default", "kwargs": {}}
        data["nodes"].insert(data["nodes"].index(node), made | {"args": [node["args"][3]["list"][place]]})
        node["args"][3]["list"][place] = {"node": "made"}

    edit_json(tables, "graph.json", change)
    with pytest.raises(fxq.BundleError, match="neither stored nor inputs"):
        fxq.load(tables)


@pytest.mark.parametrize("place", [1, 3])
def test_lists_that_are_results_are_refused(tables, place):
    def change(data):
        node = first(data, "attention_packed")
        tensors = node["args"][place]["list"]
        parts = {"name": "parts", "op": "call_function", "target": "aten.split.Tensor", "kwargs": {}}
        data["nodes"].insert(data["nodes"].index(node), parts | {"args": [tensors[0], 1, 1]})
        node["args"][place] = {"node": "parts"}

    edit_json(tables, "graph.json", change)
    with pytest.raises(fxq.BundleError):
        fxq.load(tables)


def test_a_bundle_without_the_tables_of_its_recipe_is_refused_with_what_to_do(packed, tables):
    for folder in (packed, tables):
        text = policy_to_json(dataclasses.replace(POLICY, span=2))
        edit_json(folder, "manifest.json", lambda data, text=text: data["facts"]["recipe"].update(cache=text))
    with pytest.raises(fxq.BundleError, match=r"holds no tables .*quantize again with this recipe"):
        fxq.load(packed)
    assert fxq.load(tables) is not None
    for wrong in (7, {"window": "x"}, {"keys": {"codec": "os.system"}}):
        edit_json(tables, "manifest.json", lambda data, wrong=wrong: data["facts"]["recipe"].update(cache=wrong))
        with pytest.raises(fxq.BundleError, match=r"facts\.recipe: cache"):
            fxq.load(tables)


def test_tables_load_unchanged(tables):
    assert fxq.load(tables) is not None


def edit(folder, place, value):
    def change(data):
        first(data, "attention_packed")["args"][place] = value

    edit_json(folder, "graph.json", change)


def text(**settings):
    return json.dumps({"keys": settings, "values": settings})


TEXTS = {
    "none": 7,
    "empty": "",
    "long": "[" * 1500,
    "deep": '{"keys":' + "[" * 400 + "]" * 400 + ',"values":null}',
    "code": '{"keys":{"codec":"os.system"},"values":null}',
    "an attribute": '{"keys":{"codec":"klt","__class__":1},"values":null}',
    "characters": '{"keys":{"codec":"klt\u0007"},"values":null}',
    "no codec": '{"keys":null,"values":null}',
    "other tensors": text(codec="klt", bits=1),
    "wide": text(codec="per_token", bits=2**40, block=12),
    "many stages": text(codec="prq", stages=10**12, centroids=4, block=12),
    "blocks of nothing": text(codec="per_token", bits=8, block=0),
    "a large rank": text(codec="low_rank", rank=10**15, block=12),
    "not a number": text(codec="klt", bits="NaN"),
    "another block": text(codec="per_token", bits=8, block=4, scale_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_codecs_is_checked_before_anything_is_read(packed, name):
    edit(packed, 7, TEXTS[name])
    with pytest.raises(fxq.BundleError):
        fxq.load(packed)


@pytest.mark.parametrize("span", [0, -1, 7, 2**31, 2**62, 0.5, None])
def test_a_span_of_another_size_is_refused(packed, span):
    edit(packed, 8, span)
    with pytest.raises(fxq.BundleError):
        fxq.load(packed)


@pytest.mark.parametrize("place", [3, 4])
def test_other_tensors_in_the_place_of_stored_ones_are_refused(packed, place):
    def change(data):
        node = first(data, "attention_packed")
        node["args"][place] = {"list": [node["args"][0]] * 2}

    edit_json(packed, "graph.json", change)
    with pytest.raises(fxq.BundleError):
        fxq.load(packed)


def test_it_loads_unchanged(packed):
    assert fxq.load(packed) is not None
