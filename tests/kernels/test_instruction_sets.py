"""Products of every instruction set that this CPU has, against int64: worst cases, rests, and the bounds themselves."""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

from fxq import cpu
from fxq.kernels import attention, attention_int8, dual_scale_linear, native, quantize_act
from fxq.kernels.arguments import Attention
from fxq.kernels.attention.merge import attention_lse
from fxq.kernels.gemm.panels import pack_panels
from fxq.kernels.native import build
from fxq.kernels.native.cache import cache_folder
from tests.features import library_for, needs

pytestmark = needs("native")


def use(monkeypatch, found: build.InstructionSet, library: ctypes.CDLL) -> None:
    monkeypatch.setattr(native, "library", lambda: (library, ""))
    monkeypatch.setattr(native, "instruction_set", lambda: found)


@pytest.fixture(params=build.SETS, ids=lambda found: found.kernel)
def kernels(request, monkeypatch):
    """The native kernels for one instruction set, whether or not they are the ones that this CPU gets."""
    library = library_for(request.param)
    use(monkeypatch, request.param, library)
    return request.param


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def product(q, w, split=None, bits=8):
    """Sums of the native kernel, float32 [M, N], with all scales 1."""
    split = split or q.shape[1]
    groups = 1 if split == q.shape[1] else 2
    ones = torch.ones(groups, w.shape[0]), torch.ones(groups), torch.zeros(w.shape[0])
    return dual_scale_linear(q, pack_panels(w, split, bits), *ones, split, bits, torch.float32)


def expected(q, w, split=None):
    """The same of int64 sums: a segment is rounded to float32, then their sum."""
    split = split or q.shape[1]
    parts = [slice(0, split), slice(split, q.shape[1])]
    first, second = (q[:, part].long() @ w[:, part].long().T for part in parts)
    return first.float() + second.float()


def filled(*shape, value):
    return torch.full(shape, value, dtype=torch.int8)


def within(shape, low, high, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def with_few_pairs(outputs, width):
    """Normal weights: about one pair in a hundred is more than one multiplication of bytes holds."""
    w = torch.randn(outputs, width, generator=torch.Generator().manual_seed(1))
    return (w / w.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)


SHAPES = [
    (16, 131, 130, 128),
    (17, 9000, 5, 8999),
    (1, 1, 1, 1),
    (5, 96, 40, 96),
    (6, 64, 64, 63),
    (7, 75, 19, 50),
    (25, 2052, 70, 2001),
    (200, 1111, 97, 1000),
    (13, 777, 65, 1),
    (784, 64, 66, 48),
]


@pytest.mark.parametrize(("rows", "width", "outputs", "split"), SHAPES)
def test_sums_equal_those_of_int64(rows, width, outputs, split, kernels, threads):
    q = within((rows, width), -128, 127)
    weights = [within((outputs, width), -(2**b), 2**b - 1, seed=b) for b in range(3, 8)]
    for w in (*weights, with_few_pairs(outputs, width)):
        assert torch.equal(product(q, w, split), expected(q, w, split))
    for bits in (4, 3):
        assert torch.equal(
            product(q, weights[0] >> (4 - bits), split, bits), expected(q, weights[0] >> (4 - bits), split)
        )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("split", [1, 75, 131])
def test_sums_of_every_number_of_rows_equal_those_of_int64(split, bits, kernels, threads):
    q, w = within((70, 131), -128, 127), within((70, 131), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, seed=1)
    panels, want = pack_panels(w, split, bits), expected(q, w, split)
    groups = 1 if split == 131 else 2
    for rows in range(1, 71):
        ones = torch.ones(groups, 70), torch.ones(groups), torch.zeros(70)
        assert torch.equal(dual_scale_linear(q[:rows], panels, *ones, split, bits, torch.float32), want[:rows]), rows


def before_a_wall(tensor):
    """A copy whose last byte is the last of a page, with one behind it that nobody may read."""
    length = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, length))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=length - tensor.nbytes)
    return copy.reshape(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width", "split"), [(1, 1, 1), (40, 5, 4), (33, 70, 66), (17, 129, 129), (3, 64, 64)])
def test_nothing_behind_rows_and_panels_is_read(rows, width, split, bits, kernels):
    q, w = within((rows, width), -128, 127), within((64, width), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, seed=1)
    groups = 1 if split == width else 2
    ones = torch.ones(groups, 64), torch.ones(groups), torch.zeros(64)
    rest = (before_a_wall(pack_panels(w, split, bits)), *ones, split, bits, torch.float32)
    assert torch.equal(dual_scale_linear(before_a_wall(q), *rest), expected(q, w, split))


def test_products_of_torch_and_these_leave_each_other_alone(kernels, threads):
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(33, 96).bfloat16()
    q, w = within((40, 96), -128, 127), within((33, 96), -128, 127)
    want = F.linear(x, weight)
    for _ in range(3):
        assert torch.equal(product(q, w, 90), expected(q, w, 90))
        assert torch.equal(F.linear(x, weight), want)


PAIRS = [(-128, -128), (127, 127), (-128, 127), (-128, 0), (64, 64), (64, 65), (65, 64), (-64, -64), (-64, -65)]
PAIRS += [(127, 1), (127, 2), (-127, -1), (-127, -2), (-1, -128), (0, 127)]
NARROW = [-8, 7, -9, 8, -16, 15, -17, 16, -32, 31, -33, 32, -64, 63]


def assert_extremes_are_exact(value):
    """255, or 0, times each pair, in every step: what saturates is seen."""
    w = torch.stack([torch.tensor(pair * 512, dtype=torch.int8) for pair in PAIRS])
    w = torch.cat([w, torch.stack([filled(1024, value=v) for v in NARROW]), w.flip(1)])
    for rows, width in ((3, 1024), (9, 1024), (25, 1024), (17, 1023), (40, 776), (16, 7), (25, 7)):
        q = filled(rows, 1024, value=value)[:, :width]
        for alone in w[:, :width].split(1):  # others could choose the loop
            assert torch.equal(product(q, alone), expected(q, alone)), alone[0, :2]
        assert torch.equal(product(q, w[:, :width]), expected(q, w[:, :width]))


@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums_of_every_pair_of_weights_are_exact(value, kernels):
    assert_extremes_are_exact(value)


def test_the_longest_rows_of_extremes_are_exact(kernels):
    q, w = filled(18, 13824, value=127), torch.cat([filled(1, 13824, value=-128), filled(1, 13824, value=127)])
    assert torch.equal(product(q, w, 13633), expected(q, w, 13633))
    for rows in (1, 17):
        q, w = filled(rows, 2**17 - 1, value=-128), filled(1, 2**17 - 1, value=-128)
        assert product(q, w).unique().tolist() == [2.0**14 * (2**17 - 1)]


BOUNDS = {
    "a pair of 129": ("excess_avx2.h", "_mm256_set1_epi16(128)", "_mm256_set1_epi16(129)"),
    "a pair of -129": ("excess_avx2.h", "_mm256_set1_epi16(-128)", "_mm256_set1_epi16(-129)"),
    "excess of 129": ("excess_avx2.h", "room = 128", "room = 129"),
    "eight steps of 5 bits": ("product_avx2.h", "if (within(7))", "if (within(15))"),
    "four steps of 6 bits": ("product_avx2.h", "if (within(15))", "if (within(31))"),
    "two steps of 7 bits": ("product_avx2.h", "if (within(31))", "if (within(63))"),
}


# Compiles the kernels again for each: those of AVX2, which every CPU here runs.
@pytest.mark.any_cpu
@pytest.mark.parametrize(
    "bound", [b if i % 2 else pytest.param(b, marks=pytest.mark.sweep) for i, b in enumerate(BOUNDS)]
)
def test_a_bound_that_is_one_wider_is_found_out(bound, tmp_path, monkeypatch):
    """The test above has teeth: it fails for a copy of the sources with one bound widened."""
    if cpu.missing(build.AVX2.needs):
        pytest.skip("needs avx2")
    copy = shutil.copytree(build.FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    name, old, new = BOUNDS[bound]
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    monkeypatch.setattr(build, "FOLDER", copy)
    monkeypatch.setattr(build, "FLAGS", [flag.replace("-O3", "-O1") for flag in build.FLAGS])
    product_only = build.InstructionSet("wider", build.AVX2.needs, build.AVX2.flags, ("linear.cpp",))
    use(monkeypatch, product_only, ctypes.CDLL(str(build.build(build.compiler(), tmp_path, product_only))))
    with pytest.raises(AssertionError):
        assert_extremes_are_exact(127)


def test_one_layer_after_another_leaves_nothing_behind(kernels, threads):
    """Memory that a thread keeps is used for narrow, wide and short ones in turn."""
    torch.manual_seed(0)
    for rows, width, low in ((30, 900, -8), (9, 64, -128), (61, 1500, -64), (3, 40, -128), (30, 900, -128)):
        q, w = within((rows, width), -128, 127), within((70, width), low, -low - 1)
        assert torch.equal(product(q, w, width - 24), expected(q, w, width - 24))


def test_rows_are_quantized_alike_by_every_instruction_set(kernels):
    torch.manual_seed(2)
    x = torch.randn(9, 301) * 3
    order = torch.randperm(301)
    for perm in (None, order, torch.cat([order[:250].sort().values, order[250:].sort().values])):
        arguments = (x, perm if perm is None else perm.int(), torch.tensor([0.02, 0.3]), torch.tensor([4, -30]).int())
        assert torch.equal(quantize_act(*arguments, 250, 8), quantize_act.reference(*arguments, 250, 8))


def test_results_in_bfloat16_are_rounded_as_by_torch(kernels):
    q, w = within((9, 96), -128, 127), within((70, 96), -128, 127, seed=1)
    rest = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-30])
    offset = torch.cat((rest, torch.randn(60, generator=torch.Generator().manual_seed(2)) * 1e4))
    q[0] = 0  # the result is the offset
    panels = pack_panels(w, 96)
    one, other = (
        dual_scale_linear(q, panels, torch.full((1, 70), 0.37), torch.ones(1), offset, 96, 8, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(one.bfloat16().isnan(), other.isnan()) and other[0, 8].isnan()
    assert torch.equal(one.bfloat16().nan_to_num(0.5, 2.0, -2.0), other.nan_to_num(0.5, 2.0, -2.0))


attending = pytest.mark.parametrize(
    "kernels", [found for found in build.SETS if found.attention], indirect=True, ids=lambda found: found.kernel
)
"""The sets that have attention of their own."""

LENGTHS = [(1,), (3, 0, 254), (255, 2), (600, 77, 1)]


@attending
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 1), (191, 2, 66), (97, 3, 16), (200, 1, 131)])
def test_attention_equals_that_of_float64_as_far_as_its_dtype_allows(rows, heads, size, lengths, kernels, threads):
    random = torch.Generator().manual_seed(rows + size)
    for dtype in (getattr(torch, name) for name in kernels.attention):
        q = (2 * torch.randn(2, rows, heads, size, generator=random)).to(dtype)
        k, v = ([torch.randn(2, n, heads, size, generator=random).to(dtype) for n in lengths] for _ in range(2))
        whole = [torch.cat(piece, 1).double().transpose(1, 2) for piece in (k, v)]
        want = F.scaled_dot_product_attention(q.double().transpose(1, 2), *whole).transpose(1, 2).flatten(2)
        got = attention(q, k, v)
        assert got.dtype == dtype and got.shape == want.shape
        assert float((got.double() - want).norm() / want.norm()) < (2e-6 if dtype == torch.float32 else 0.006)
        part, lse = native.attention_lse(Attention(q, k, v))
        _, logarithm = attention_lse(q, *(torch.cat(piece, 1) for piece in (k, v)))
        torch.testing.assert_close(lse, logarithm, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            part.flatten(2).double(), want, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0
        )


@attending
def test_attention_of_every_instruction_set_shows_what_is_not_finite(kernels):
    for dtype in (getattr(torch, name) for name in kernels.attention):
        q, k, v = (
            torch.randn(1, n, 2, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (9, 300, 300)
        )
        q[0, 4, 1, 3] = torch.nan
        got = attention(q, [k], [v]).unflatten(2, (2, 16))
        assert not got[0, 4, 1].isfinite().any() and int((~got.isfinite()).sum()) == 16
        k[0, 270, 0, 3] = torch.nan
        assert not attention(q, [k], [v]).unflatten(2, (2, 16))[:, :, 0].isfinite().any()
        far = attention(
            1e20 * torch.ones_like(q), [torch.linspace(-1, 1, 300).reshape(1, -1, 1, 1).expand_as(k).to(dtype)], [v]
        )
        torch.testing.assert_close(far, v[:, -1:].expand(1, 9, 2, 16).flatten(2), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 1), (191, 2, 66), (33, 3, 128), (17, 1, 131)])
def test_attention_in_8_bits_by_tiles_is_bit_for_bit_that_without(rows, heads, size, dtype, monkeypatch, threads):
    random = torch.Generator().manual_seed(rows + size)
    q = torch.randn(2, rows, heads, size, generator=random).to(dtype)
    k, v = ([torch.randn(2, n, heads, size, generator=random).to(dtype) for n in (3, 1, 333)] for _ in range(2))
    v[2][:, :70] = 9.0
    found = []
    for one in (build.AMX, build.AVX512):
        use(monkeypatch, one, library_for(one))
        found.append(attention_int8(q, k, v))
    assert torch.equal(*found) and found[0].isfinite().all()


ABOVE_256_BITS = r"%zmm|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])"
ABOVE_AVX2 = rf"{ABOVE_256_BITS}|vpdpbusd|vpdpwssd"


def code_of(target):
    file = build.build(build.compiler(), cache_folder(), target)
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(file)], capture_output=True, text=True).stdout


needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")


@needs_objdump
def test_tiles_are_asked_for_given_back_and_nowhere_but_in_the_library_for_amx():
    library_for(build.AMX)
    tiles = re.findall(r"\b(tdp\w+|ldtilecfg|tilerelease)\b", code_of(build.AMX))
    assert set(tiles) == {"tdpbusd", "tdpbf16ps", "ldtilecfg", "tilerelease"}
    assert not re.findall(r"\btile|\btdp|%tmm", code_of(build.AVX512))


def loops_without_spills(code, names):
    loops = re.findall(rf"<\w*multiply_(?:{names})\w*>:\n(.*?)\n\n", code, re.S)
    assert loops
    spilled = [
        line for body in loops for line in body.splitlines() if re.search(r"%ymm\d+,-?(0x)?[\da-f]*\(%rsp", line)
    ]
    assert len(spilled) <= len(loops), spilled  # one constant at most, never a sum


@needs_objdump
def test_what_is_compiled_for_avx512_without_bfloat16_multiplies_it_only_where_nobody_calls():
    library_for(build.VNNI)
    functions = re.findall(r"<(\w+)(?:\.\w+)*>:\n(.*?)(?:\n\n|\Z)", code_of(build.VNNI), re.S)
    above = {name for name, body in functions if re.search(r"\tv(?:dpbf16ps|cvtn?e?2?ps2?bf16|pcompress[bw])\b", body)}
    assert functions and all("attend" in name for name in above) and build.VNNI.attention == ()


@needs_objdump
def test_what_is_compiled_for_avx_vnni_holds_its_products_and_no_instruction_of_avx512():
    library_for(build.AVX_VNNI)
    code = code_of(build.AVX_VNNI)
    assert "vpdpbusd" in code and "vpdpwssd" in code and "vpmaddubsw" not in code
    assert not re.findall(ABOVE_256_BITS, code)
    loops_without_spills(code, "bytes|float|word_tile")


@needs_objdump
def test_what_is_compiled_for_avx2_holds_no_instruction_above_it():
    if cpu.missing(build.AVX2.needs):
        pytest.skip("needs avx2")
    code = code_of(build.AVX2)
    assert "vpmaddubsw" in code and "vfmadd" in code
    assert not re.findall(ABOVE_AVX2, code)
    loops_without_spills(code, "words|pairs|narrow|few|column|float|word_tile")
