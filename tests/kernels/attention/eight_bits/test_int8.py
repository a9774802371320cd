"""Attention in 8-bit integers: exact where it says so on every instruction set, and else as near as 8 bits are."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
import torch.nn.functional as F

from fxq import cpu
from fxq.kernels import attention_int8, native
from fxq.kernels.attention.eight_bits import int8
from fxq.kernels.native import build
from tests.features import library_for


def use(monkeypatch, found: build.InstructionSet, library: ctypes.CDLL) -> None:
    monkeypatch.setattr(native, "library", lambda: (library, ""))
    monkeypatch.setattr(native, "instruction_set", lambda: found)


@pytest.fixture(
    params=["reference", build.AVX512, build.VNNI, build.AVX_VNNI, build.AVX2],
    ids=lambda p: p if isinstance(p, str) else p.kernel,
)
def kernel(request, monkeypatch):
    """The reference, and the native kernels of every instruction set that this CPU has."""
    if request.param == "reference":
        monkeypatch.setattr(native, "library", lambda: (None, "not asked for"))
    else:
        use(monkeypatch, request.param, library_for(request.param))
    return request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(q, k, v):
    k, v = torch.cat(list(k), 1), torch.cat(list(v), 1)
    heads = (t.double().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "lengths", "heads", "size"),
    [
        (1, (1,), 1, 1),
        (7, (3, 0, 254), 2, 66),
        (193, (255, 2), 2, 16),
        (100, (600, 77, 1), 3, 128),
        (5, (257,), 1, 131),
    ],
)
def test_it_is_near_attention_in_float64(rows, lengths, heads, size, dtype, kernel):
    q = normal(2, rows, heads, size).to(dtype)
    k, v = ([normal(2, n, heads, size, seed=i + n).to(dtype) for n in lengths] for i in (1, 2))
    got = attention_int8(q, k, v)
    assert got.shape == (2, rows, heads * size) and got.dtype == dtype and got.is_contiguous()
    assert error(got, exact(q, k, v)) < 0.025
    assert error(got, attention_int8.reference(q, k, v).double()) < (5e-4 if dtype == torch.float32 else 5e-3)


def test_a_mean_of_the_keys_costs_no_precision(kernel):
    q, k, v = normal(1, 40, 2, 64), normal(1, 300, 2, 64, seed=1), normal(1, 300, 2, 64, seed=2)
    shift = 30 * normal(1, 1, 2, 64, seed=3)
    plain, shifted = error(attention_int8(q, [k], [v]), exact(q, [k], [v])), k + shift
    assert error(attention_int8(q, [shifted], [v]), exact(q, [shifted], [v])) < plain + 1e-3
    pieces = [k[:, :100] + shift, k[:, 100:] + shift + 0.02 * shift]
    values = list(v.split([100, 200], 1))
    assert error(attention_int8(q, pieces, values), exact(q, pieces, values)) < plain + 1e-3


def weights_of(q, k):
    """Integers that the weights of at most 64 keys are, [S, keys]: values are the unit vectors."""
    keys = k.shape[1]
    v = torch.eye(keys, q.shape[3]).reshape(1, keys, 1, q.shape[3])
    out = attention_int8(q, [k], [v])[0, :, :keys]
    return out / out.amax(-1, keepdim=True) * int8.MOST_WEIGHT


def test_weights_are_the_integers_of_the_definition(kernel):
    q, k = 2 * normal(1, 50, 1, 64), normal(1, 61, 1, 64, seed=1)
    got = weights_of(q, k)
    assert (got - got.round()).abs().max() < 0.05
    codes, scale = int8.quantized_rows(q)
    rows, scales = int8.quantized_rows(k - int8.key_mean(k).unsqueeze(1))
    sums = codes.double() @ rows.double().transpose(2, 3)
    scores = (sums * scales.double().transpose(2, 3) * scale.double() / 8 + 0)[0, 0]
    want = ((scores - scores.amax(-1, keepdim=True)).exp() * int8.MOST_WEIGHT).round()
    assert (got - want).abs().max() < 1.05 and float(((got - want).abs() > 0.5).double().mean()) < 0.1


LESS = 12850
"""A weight below the largest."""


def two_keys(size, ratio):
    """A query and two opposite keys of the largest codes alone, whose weights are as 1 to ``ratio``."""
    value = (torch.tensor(1 / ratio, dtype=torch.float64).log() / 2 / size**0.5).sqrt().float()
    q = value.expand(1, 1, 1, size).contiguous()
    return q, torch.cat([q, -q], 1)


@pytest.mark.parametrize("size", [16, 64, 130, int8.MOST_HEAD_DIM])
def test_the_largest_sums_of_integers_are_exact(size, kernel):
    q, k = two_keys(size, LESS / int8.MOST_WEIGHT)
    v = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, size)
    for one, keys in ((q, k), (-q, k.flip(1))):
        want = (int8.MOST_WEIGHT - LESS) / (int8.MOST_WEIGHT + LESS)
        got = attention_int8(one, [keys], [v if one is q else v.flip(1).neg()])
        assert torch.allclose(got, torch.full_like(got, want), atol=1e-6, rtol=0), (got[0, 0, 0], want)


def assert_blocks_of_equal_keys_are_exact():
    """All weights and all codes are the largest: what overflows, and a block that ends elsewhere, is seen."""
    q, k = normal(1, 7, 1, 64), torch.zeros(1, 514, 1, 64)
    v = torch.full((1, 514, 1, 64), -2.0)
    v[:, 256:512], v[:, 512:] = 1.0, 0.5
    got = attention_int8(q, [k], [v])
    assert torch.allclose(got, torch.full_like(got, (-512 + 256 + 1) / 514), atol=1e-6, rtol=0)
    q, k = two_keys(64, LESS / int8.MOST_WEIGHT)
    got = attention_int8(q, [k], [torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 64)])
    assert torch.allclose(got, torch.full_like(got, int8.MOST_WEIGHT / (int8.MOST_WEIGHT + LESS)), atol=1e-6, rtol=0)
    v = normal(1, 514, 1, 64, seed=2)
    v[0, 255], v[0, 256] = 50.0, 0.01
    k = normal(1, 514, 1, 64, seed=1) / 8
    got, want = attention_int8(q, [k], [v]), attention_int8.reference(q, [k], [v])
    assert torch.allclose(got, want, atol=2e-5, rtol=0)


def test_blocks_of_equal_keys_are_exact(kernel):
    assert_blocks_of_equal_keys_are_exact()


BOUNDS = {
    "a weight of 32768": ("MOST_WEIGHT = 32767.0f", "MOST_WEIGHT = 32768.0f"),
    "a code of 128": ("MOST_CODE = 127.0f", "MOST_CODE = 128.0f"),
    "a block of fewer keys": ("BLOCK_KEYS = 256;", "BLOCK_KEYS = 248;"),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_another_number_in_the_source_is_found_out(bound, tmp_path, monkeypatch):
    """The test above has teeth: it fails for a copy of the source with another number."""
    if reason := native.why_not() or ", ".join(cpu.missing(build.AVX2.needs)):
        pytest.skip(f"needs native: {reason}")
    copy = shutil.copytree(build.FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file, (old, new) = copy / "attention_int8.cpp", BOUNDS[bound]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    monkeypatch.setattr(build, "FOLDER", copy)
    monkeypatch.setattr(build, "FLAGS", [flag.replace("-O3", "-O1") for flag in build.FLAGS])
    wider = build.InstructionSet("wider", build.AVX2.needs, build.AVX2.flags, (file.name,))
    use(monkeypatch, wider, ctypes.CDLL(str(build.build(build.compiler(), tmp_path, wider))))
    with pytest.raises(AssertionError):
        assert_blocks_of_equal_keys_are_exact()


def test_the_widest_head_is_the_widest_whose_sums_float32_holds():
    def product(size):
        codes = torch.full((1, size), 127.0)
        return int((codes @ codes.T).item()) == 127**2 * size

    assert product(int8.MOST_HEAD_DIM) and not product(int8.MOST_HEAD_DIM + 1)
    assert int8.MOST_WEIGHT * 127 * int8.VALUE_BLOCK < 2**31 < int8.MOST_WEIGHT * 127 * 517
    assert int8.MOST_WEIGHT * int8.VALUE_BLOCK < 2**24, "sums of weights are exact in float32"
    q = normal(1, 2, 1, int8.MOST_HEAD_DIM + 1)
    with pytest.raises(ValueError, match="heads of 1041 channels: expected at most 1040"):
        attention_int8(q, [q], [q])


def test_a_piece_is_quantized_by_itself(kernel):
    """Keys elsewhere change no integer of a piece: weights of its keys keep their ratios."""
    q, k = normal(1, 9, 1, 64), normal(1, 30, 1, 64, seed=1)
    v = torch.eye(30, 64).reshape(1, 30, 1, 64)
    alone = attention_int8(q, [k], [v])
    other = 3 * normal(1, 40, 1, 64, seed=2)
    beside = attention_int8(q, [other, k], [torch.zeros(1, 40, 1, 64), v])
    assert torch.allclose(beside / beside.sum(-1, keepdim=True), alone, atol=1e-5)


def test_pieces_are_read_where_they_lie(kernel):
    merged = normal(2, 50, 3 * 96)
    q, k, v = (part.unflatten(-1, (3, 32)) for part in merged.split(96, -1))
    cache = normal(2, 3, 300, 32, seed=1).transpose(1, 2)
    got = attention_int8(q, [cache, k], [cache, v])
    assert error(got, exact(q, [cache, k], [cache, v])) < 0.02
    assert torch.equal(got, attention_int8(q.contiguous(), *[[t.contiguous() for t in (cache, x)] for x in (k, v)]))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads, kernel):
    q, k, v = normal(1, 500, 2, 64), normal(1, 900, 2, 64, seed=1), normal(1, 900, 2, 64, seed=2)
    before = torch.get_num_threads()
    want = attention_int8(q, [k], [v])
    torch.set_num_threads(threads)
    try:
        assert torch.allclose(attention_int8(q, [k], [v]), want, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_scores_of_any_size_survive(kernel):
    q = torch.tensor([300.0, -300.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 16)
    k = torch.linspace(-300, 300, 400).reshape(1, 400, 1, 1).expand(1, 400, 1, 16)
    v = torch.arange(400.0).reshape(1, 400, 1, 1).expand(1, 400, 1, 16) / 256
    assert attention_int8(q, [k], [v])[0, :, 0].tolist() == pytest.approx([399 / 256, 0.0, 399 / 512], abs=0.01)


def test_without_a_key_the_result_is_zero(kernel):
    q = normal(1, 3, 1, 16)
    assert torch.equal(attention_int8(q, [q[:, :0]], [q[:, :0]]), torch.zeros(1, 3, 16))
    assert attention_int8(q[:, :0], [q], [q]).shape == (1, 0, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_shows_in_every_row_and_a_value_in_its_channel(value, kernel):
    q, k, v = normal(1, 9, 2, 16), normal(1, 300, 2, 16, seed=1), normal(1, 300, 2, 16, seed=2)
    k[0, 270, 1, 3] = value
    got = attention_int8(q, [k[:, :5], k[:, 5:]], [v[:, :5], v[:, 5:]]).unflatten(2, (2, 16))
    assert got[:, :, 0].isfinite().all() and not got[:, :, 1].isfinite().any()
    k[0, 270, 1, 3], v[0, 280, 0, 5] = 0.0, value
    broken = ~attention_int8(q, [k], [v]).isfinite()
    assert broken[..., 5].all() and int(broken.sum()) == 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: (q.double(), [q], [q]), "q is torch.float64"),
        (lambda q: (q, [q], []), "1 pieces of keys, 0 of values"),
        (lambda q: (q, [q[:, :, :, :8]], [q]), r"k\[0\] is torch.float32 \(1, 4, 2, 8\): expected"),
        (lambda q: (q, [q], [q[:, :3]]), r"k\[0\] is \(1, 4, 2, 16\), v\[0\] \(1, 3, 2, 16\)"),
    ],
)
def test_what_does_not_fit_is_told(change, match):
    with pytest.raises(ValueError, match=f"fxq::attention_int8: .*{match}"):
        attention_int8(*change(normal(1, 4, 2, 16)))
