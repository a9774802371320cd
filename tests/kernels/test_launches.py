"""The launches through Triton's own binding of arguments and compiler, up to the point where a GPU would be needed."""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils import _pytree as pytree

from fxq.cache.codecs import Float8, Int8Attention, Kivi, Klt, PerToken, Prq, QuaRot
from fxq.kernels import FLOAT8, OPS, attention_int8_fp8, attention_packed, dual_scale_linear_quantize, used
from fxq.kernels.attention.spans import AttentionPacked, parts
from fxq.kernels.attention.triton_pack import pack_blocks
from fxq.kernels.cluster import triton as clusters
from fxq.kernels.gemm import gluon as gluon_gemm
from fxq.kernels.gemm.activations import ACTIVATIONS, Activation
from fxq.kernels.gemm.op import sample_operands
from fxq.kernels.op import Op
from tests.kernels.interpreted_cache import arguments

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET replaces the compiler"
)

BOUND = [op for op in OPS if op.used("cuda") == "triton" and op not in FLOAT8]
ARCHITECTURES = [90, *(pytest.param(other, marks=pytest.mark.sweep) for other in (80, 120))]
ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class Driver:
    """Stands in for the driver of a GPU that is not there; the device's number keeps compiled kernels apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def launched(request, monkeypatch):
    """Names of the kernels that were compiled for a launch on the architecture in the parameter."""
    names: list[str] = []

    def compile_only(kernel, grid):
        def run(*arguments, **options):
            kernel.run(*arguments, grid=grid, warmup=True, **options)
            names.append(kernel.__name__)

        return run

    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(request.param, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(driver, "_active", Driver(request.param))
    return names


def check(op: Op, sample: tuple, launched: list[str], float8: bool = True) -> None:
    """One kernel is compiled, none without rows; zero points per token take another one before it for their weights.

    Attention to an encoded cache takes one for each of its parts.

    Panels of the CPU kernel are refused. Without ``float8`` the GPU has no such products.
    """
    if any(isinstance(a, torch.Tensor) and a.ndim == 4 and a.dtype == torch.int8 for a in sample):
        with pytest.raises(ValueError, match="panels for the CPU kernel"):
            op.definition.redispatch(ON_CUDA, *sample)
        return
    results = pytree.tree_leaves(op.definition.redispatch(ON_CUDA, *sample)), pytree.tree_leaves(op.reference(*sample))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
        if op.name == "attention_packed":
            assert launched == packed_launches(AttentionPacked(*sample))
            continue
        if op.name in ("attention_int8", "attention_int8_fp8"):
            values = ["values_kernel"] if op.name == "attention_int8_fp8" and float8 else []
            each = ["codes_kernel", *values, f"{op.name if float8 else 'attention_int8'}_kernel"]
            assert launched == each[:1] + each * sum(1 for k in sample[1] if k.shape[1])
            continue
        sums = ["weight_sums_kernel"] if has_zero_points(op, sample) else []
        assert launched[:-1] == sums if want.numel() else not launched


def packed_launches(a: AttentionPacked) -> list[str]:
    """A kernel for every exact piece that holds a key; one for all spans, or for each after those that read planes.

    Of integers one before for the codes of the queries, and one for those of each exact piece's keys.
    """
    if '"attention"' in a.codec:  # of integers
        exact = ["codes_kernel", "attention_int8_kernel"] * sum(1 for k in a.k if k.shape[1])
        return ["codes_kernel", *exact, *["attention_stored_kernel"] * bool(list(parts(a)))]
    part = "attention_part_kernel"
    planes = ["planes_kernel"] * a.codec.count('"klt"')
    exact, spans = [part] * sum(1 for k in a.k if k.shape[1]), len(list(parts(a)))
    return exact + ([*planes, part] * spans if planes else [part] * bool(spans))


def has_zero_points(op: Op, sample: tuple) -> bool:
    """Whether the input scales of a product per token have zero points behind those of its groups."""
    if op.name not in ("dual_scale_linear_per_token", "dual_scale_linear_per_token_add"):
        return False
    return op.take(sample).operands.asymmetric


@pytest.mark.parametrize("launched", [90], indirect=True)
@pytest.mark.parametrize("op", [*BOUND, *FLOAT8], ids=lambda op: op.name)
def test_a_launch_binds_and_compiles(op, launched):
    check(op, op.samples()[0], launched)


@pytest.mark.parametrize("launched", [90], indirect=True)
def test_an_activation_without_a_triton_function_lies_between_two_launches(launched, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "relu", Activation("relu", torch.relu))
    operands = sample_operands((5, 128), 40, 128, 8, torch.Generator().manual_seed(0))
    tail = ("relu", torch.ones(1), torch.zeros(1, dtype=torch.int32), 40, 8)
    got = dual_scale_linear_quantize.definition.redispatch(ON_CUDA, *operands, *tail)
    assert launched == ["linear_kernel", "quantize_kernel"] and got.shape == (5, 40) and got.dtype == torch.int8
    assert ACTIVATIONS["relu"].eager_on("cuda") == "the Triton kernels have no relu: torch computes it"


@pytest.mark.slow
@pytest.mark.parametrize("launched", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op.name}-{i}", marks=pytest.mark.sweep if i % 2 else ())
        for op in BOUND
        for i, sample in enumerate(op.samples())
    ],
)
def test_every_launch_binds_and_compiles(op, sample, launched, request):
    check(op, sample, launched, float8=request.node.callspec.params["launched"] >= 89)


@pytest.mark.parametrize("launched", [80], indirect=True)
@pytest.mark.parametrize("op", FLOAT8, ids=lambda op: op.name)
def test_float8_needs_a_gpu_that_has_it(op, launched):
    with pytest.raises(ValueError, match="a GPU is sm_80: float8 needs sm_89; quantize to int8 instead"):
        op.definition.redispatch(ON_CUDA, *op.samples()[0])
    assert not launched


@pytest.mark.parametrize("launched", [80], indirect=True)
def test_attention_with_float8_values_runs_in_16_bits_without_them(launched, monkeypatch):
    check(attention_int8_fp8, attention_int8_fp8.samples()[1], launched, float8=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((8, 0), "triton, values in 16 bits"), ((8, 9), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert used("attention_int8_fp8", "cuda:0") == name and used("attention_int8", "cuda:0") == "triton"


@pytest.mark.skipif(not gluon_gemm.HAS_GLUON, reason="this Triton has no Gluon")
@pytest.mark.parametrize("launched", [90], indirect=True)
@pytest.mark.parametrize("tiles", gluon_gemm.TABLE, ids=lambda t: f"{t.block_m}x{t.block_n}")
@pytest.mark.parametrize("split", [96, 128])
def test_the_gluon_launch_binds_and_compiles(split, tiles, launched):
    operands = sample_operands((5, 128), 40, split, 8, torch.Generator().manual_seed(0))
    assert gluon_gemm.launch_gluon(operands, torch.bfloat16, tiles).shape == (5, 40)
    assert launched == ["gluon_kernel"]


@pytest.mark.parametrize("launched", [90], indirect=True)
@pytest.mark.parametrize("codec", [Prq(2, 4, block=16), Kivi(2, 0, 16), Float8(), Klt(1.0), QuaRot(2, 16)], ids=repr)
def test_every_form_of_an_encoded_cache_binds_and_compiles(codec, launched):
    a = arguments(codec, codec, gone=5, dtype=torch.bfloat16)
    got = attention_packed.definition.redispatch(ON_CUDA, *a)
    assert got.shape == (2, 5, 96) and got.dtype == torch.bfloat16
    exact, whole, span = ["attention_part_kernel"] * 2, ["attention_part_kernel"], ["planes_kernel"] * 2
    each = {"klt": 2 * (span + whole), "quarot": 2 * whole}
    assert launched == exact + each.get(codec.name, whole)


@pytest.mark.parametrize("launched", [90, 100], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stored_integers_take_one_launch_for_all_spans(dtype, launched):
    a = arguments(Int8Attention(), Int8Attention(), spans=3, gone=5, dtype=dtype, integers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = attention_packed.definition.redispatch(ON_CUDA, *a)
    assert got.shape == (2, 5, 96) and got.dtype == dtype
    assert launched == packed_launches(a) and launched.count("attention_stored_kernel") == 1


@pytest.mark.parametrize("launched", [90], indirect=True)
def test_heads_wider_than_a_tile_take_the_reference_and_say_so(launched):
    for codec, integers in ((PerToken(4, 16), False), (Int8Attention(), True)):
        a = arguments(codec, codec, size=144, integers=integers)
        with pytest.warns(UserWarning, match="heads of 144 channels run the reference: the kernel takes 128"):
            assert attention_packed.definition.redispatch(ON_CUDA, *a).shape == (2, 5, 432)
    assert not launched


@pytest.mark.parametrize("launched", [90], indirect=True)
def test_the_kernels_that_encode_bind_and_compile(launched):
    x, centroids, sizes = torch.randn(2, 40, 32), torch.randn(2, 5, 32), torch.full((10,), 8)
    assert clusters.nearest(x, centroids).shape == (2, 40)
    assert clusters.means(x, torch.arange(80), sizes, centroids).shape == centroids.shape
    scale = torch.ones(2, 40, 2).to(torch.float8_e4m3fn)
    assert pack_blocks(x, scale, None, 2).shape == (2, 40, 8)
    assert pack_blocks(x, scale.bfloat16(), scale.bfloat16(), 4).shape == (2, 40, 16)
    assert launched == ["nearest_kernel", "means_kernel", "pack_kernel", "pack_kernel"]
