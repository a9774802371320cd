"""A bundle whose graph reads an encoded cache: texts of codecs and sizes that a stranger chose."""

import json

import pytest
import torch

import fxq
from fxq.cache.codecs import PerToken
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes import pack_cache
from tests.attacks.corpus import edit_json, first


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
