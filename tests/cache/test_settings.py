"""A cache policy as data."""

import json

import pytest

from fxq.cache.codecs import PRESETS, Klt, PerToken, Prq
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import (
    CacheSettingsError,
    codec_from_json,
    codec_to_json,
    policy_from_json,
    policy_to_json,
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_known_by_name_and_come_back_from_data(name):
    assert codec_from_json(name) == PRESETS[name]
    assert codec_from_json(json.loads(json.dumps(codec_to_json(PRESETS[name])))) == PRESETS[name]


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy(),
        CachePolicy(window=21, sink=3, positions="relative", keys=Klt(0.5), values=Prq(2), span=2, recent=0),
        CachePolicy(keys=(PerToken(4), None), layers=(0,)),
    ],
)
def test_a_policy_comes_back_from_data(policy):
    assert policy_from_json(json.loads(json.dumps(policy_to_json(policy)))) == policy


def test_settings_may_be_left_out():
    assert policy_from_json({"keys": "qvg", "values": {"codec": "klt"}}) == CachePolicy(
        keys=PRESETS["qvg"], values=Klt()
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"windw": 3}, "unknown setting 'windw'; did you mean 'window'"),
        ({"keys": "qvgg"}, "unknown codec 'qvgg'; did you mean 'qvg'"),
        ({"keys": {"codec": "klt", "bits": "many"}}, r"cache\.keys\.bits: Input should be a valid number"),
        ({"keys": {"codec": "klt", "stages": 2}}, "unknown setting 'stages'"),
        ({"values": [{"codec": "klt", "bits": -1}]}, r"cache\.values\[0\]: bits = -1\.0"),
        ({"window": 2.5}, r"cache\.window"),
        ({"positions": "up"}, "Input should be 'absolute' or 'relative'"),
        ({"positions": "relative"}, "needs a window"),
        ({"keys": 3}, "expected a name or a table"),
        ([], "expected a table of settings, got list"),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(CacheSettingsError, match=message):
        policy_from_json(data)
