"""Inputs of an encoded cache that codecs can read, and what a fingerprint on them finds."""

import dataclasses

import pytest
import torch

import fxq
from fxq.cache.codecs import Exact, Float8, Klt, LowRank, PerToken, Prq
from fxq.cache.codecs.packing import unpack
from fxq.cache.codecs.record import Record
from fxq.cache.policy import CachePolicy
from fxq.export.fingerprint import compare_fingerprint, take_fingerprint
from fxq.export.graph.encoded import EncodedError, encoded, packs, seeded_cache
from fxq.export.inputs import input_entries, noise
from fxq.kernels import native
from fxq.passes import pack_cache
from tests.toys import wan_rollout

PAIRS = {
    "klt": (Klt(1.0), Klt(2.5, rank=16)),
    "joint": (Klt(0.7, joint=True), None),
    "prq": (Prq(2, 8, block=32), Prq(1, 12, 4, 16, asymmetric=True)),
    "others": (LowRank(2), Float8()),
    "rounding": (PerToken(8, 32, scale_dtype="bfloat16"), Exact()),
}


@pytest.fixture(scope="module")
def quantized():
    rollout = wan_rollout()
    return fxq.quantize(rollout.denoiser, rollout, "w8a8-dynamic", progress=False)


def sizes_of(entries):
    return [entry.example for entry in entries]


def seeded(module, seed):
    return seeded_cache(module, sizes_of(input_entries(module)), seed, noise)


def packed(quantized, name):
    keys, values = PAIRS[name]
    return pack_cache(quantized, CachePolicy(keys=keys, values=values, span=1))


@pytest.mark.parametrize("name", PAIRS)
def test_a_packed_graph_has_a_fingerprint(quantized, name):
    module = packed(quantized, name)
    entries = input_entries(module)
    found = take_fingerprint(module, entries)
    assert found.inputs == "stored" and len(found.outputs) == 5, found.reason
    assert compare_fingerprint(module, entries, found) == []


def test_inputs_are_the_same_whenever_they_are_made_and_differ_from_each_other(quantized):
    module = packed(quantized, "klt")
    entries = input_entries(module)
    some, again = seeded(module, 7), seeded(module, 7)
    assert some.keys() == again.keys() and all(some[i].equal(again[i]) for i in some)
    assert {entries[i].name for i in some} >= {"prefix_k_0_width", "prefix_v_0_planes"}
    keys, values = (some[next(i for i in some if entries[i].name == f"prefix_{k}_0_mean")] for k in "kv")
    assert not keys.equal(values)
    assert not all(some[i].equal(other) for i, other in seeded(module, 8).items())


CHANGES = {
    "nothing": lambda x, kind: x,
    "values are decoded larger": lambda x, kind: x * (1.1 if kind == "values" else 1),
    "keys are decoded larger": lambda x, kind: x * (1.3 if kind == "keys" else 1),
    "tokens trade places": lambda x, kind: x.roll(1, 1) if kind == "values" else x,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["klt", "prq"])
def test_a_codec_that_reads_otherwise_is_found(quantized, name, change, monkeypatch):
    """The fake cache of two spans is as large as the rest of what attention sees, so its decoding counts."""
    module = packed(quantized, name)
    entries = input_entries(module)
    recorded = take_fingerprint(module, entries)
    monkeypatch.setattr(native, "ready", lambda: False)  # native kernels call no codec
    for codec in {type(c) for c in PAIRS[name]}:
        old = codec.decode
        monkeypatch.setattr(codec, "coefficients", lambda self, record, kind: None)
        monkeypatch.setattr(
            codec, "decode", lambda self, record, kind, old=old: CHANGES[change](old(self, record, kind), kind)
        )
    assert bool(compare_fingerprint(module, entries, recorded)) == (change != "nothing")


def test_planes_that_are_read_upside_down_are_found(quantized, monkeypatch):
    module = packed(quantized, "klt")
    entries = input_entries(module)
    recorded = take_fingerprint(module, entries)
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr("fxq.cache.codecs.klt.unpack", lambda planes, bits, count: 1 - unpack(planes, bits, count))
    assert compare_fingerprint(module, entries, recorded)


def test_fingerprints_from_before_are_compared_on_the_inputs_they_were_taken_with(quantized):
    module = packed(quantized, "rounding")
    entries = input_entries(module)
    recorded = take_fingerprint(module, entries)
    older = dataclasses.replace(recorded, inputs="plain")
    assert compare_fingerprint(module, entries, older)
    assert not packs(quantized) and take_fingerprint(quantized, input_entries(quantized)).inputs == "plain"


def test_sizes_that_a_codec_does_not_have_are_refused(quantized):
    module = packed(quantized, "klt")
    entries = input_entries(module)
    place = next(i for i, entry in enumerate(entries) if entry.name == "prefix_k_0_basis")
    sizes = sizes_of(entries)
    sizes[place] = (2, 2, 32, 7)
    with pytest.raises(EncodedError, match=r"basis has the sizes \(2, 2, 32, 7\)"):
        seeded_cache(module, sizes, 1, noise)
    assert [item.kind for item in encoded(module, sizes_of(entries))] == ["keys", "values"]


def test_a_large_cache_is_not_made_up(quantized):
    module = packed(quantized, "rounding")
    entries = [
        dataclasses.replace(e, example=tuple(2**16 * 12 if s == 24 else s for s in e.example))
        for e in input_entries(module)
    ]
    assert not any(2**24 in entry.example for entry in entries)
    with pytest.raises(EncodedError, match="the encoded cache has more than 4194304 values"):
        seeded_cache(module, sizes_of(entries), 1, noise)


def test_numbers_of_a_cache_are_about_one(quantized):
    for name in PAIRS:
        module = packed(quantized, name)
        entries = input_entries(module)
        made = seeded(module, 3)
        positions = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        for item in encoded(module, sizes_of(entries)):
            tensors = {f.name: made[positions[n]] for f, n in zip(item.fields, item.reads, strict=True)}
            x = item.codec.decode(Record(item.fields, tensors, item.shape), item.kind)
            assert x.isfinite().all() and 0.25 < float(x.std()) < 4, (name, item.kind, float(x.std()))
            assert not torch.equal(x[0], x[1])
