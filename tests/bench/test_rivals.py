import dataclasses
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fxq import cpu
from fxq.bench import rivals
from fxq.bench.cases import LEAST_SQNR, QUICK_BLOCKS, BlockShape, LinearShape
from fxq.bench.contest import BASELINES, Case, run_case, sqnr
from fxq.bench.floats import OneDnnLinear
from fxq.bench.problems import block_problem, linear_problem
from fxq.models.causal_wan import CausalWanConfig
from fxq.runtime.timing import settings
from tests.features import needs

LINEAR, FFN = LinearShape(33, 96, 70), LinearShape(17, 64, 48, 130)
BY_NAME = {rival.name: rival for rival in rivals.RIVALS}


@pytest.fixture(scope="module", params=[LINEAR, FFN], ids=["linear", "ffn"])
def problem(request):
    return linear_problem(request.param, "cpu")


def accuracy(problem, name):
    """(SQNR of a rival against float64, what ran)."""
    rival = BY_NAME[name]
    if "bf16" in name and (reason := rival.obstacle()):
        pytest.skip(f"needs bfloat16: {reason}")
    if rival.needs:
        pytest.importorskip(rival.needs)
    with settings(1):
        built = rival.build(problem, 1)
        output = problem.pick((built.output or built.call)())
        want = problem.pick(problem.model(torch.float64)(*problem.args(torch.float64)))
    assert output.shape == want.shape
    return sqnr(want, output), built.kernel


@pytest.mark.parametrize("name", [*BASELINES, "fp32 oneDNN", "bf16 oneDNN", "_int_mm, eager dequantize"])
def test_torch_rivals_compute_the_problem(problem, name):
    assert accuracy(problem, name)[0] >= LEAST_SQNR["linear"][BY_NAME[name].arithmetic]


ONNXRUNTIME = ("onnxruntime QDQ", "onnxruntime MatMulInteger", "onnxruntime MatMulInteger u8")


@pytest.mark.parametrize("name", ONNXRUNTIME)
def test_onnxruntime_computes_the_problem_in_integers(problem, name):
    found, kernel = accuracy(problem, name)
    assert found >= LEAST_SQNR["linear"]["int8"]
    linears = sum(isinstance(layer, nn.Linear) for layer in problem.module.modules())
    wanted = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul")
    assert any(f"{linears} {kind}" in kernel for kind in wanted), kernel
    assert "FusedGemm" not in kernel


@pytest.mark.parametrize("name", ["OpenVINO QDQ", "OpenVINO QDQ, bf16 hint"])
def test_openvino_computes_the_problem_in_integers(problem, name):
    found, kernel = accuracy(problem, name)
    assert found >= LEAST_SQNR["linear"]["int8"]
    assert all("i8" in part.lower() for part in kernel.split(", ")), kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fp32 compiled", marks=pytest.mark.sweep),
        "bf16 compiled",
        "torchao dynamic int8",
        pytest.param("torchao static int8", marks=pytest.mark.sweep),
        "PT2E x86 inductor",
    ],
)
def test_compiled_rivals_compute_the_problem(problem, name):
    assert accuracy(problem, name)[0] >= LEAST_SQNR["linear"][BY_NAME[name].arithmetic]


def test_a_rival_whose_instructions_are_missing_says_so_without_a_try(problem, monkeypatch):
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2", "avx512_bw"}))
    bounds = LEAST_SQNR["linear"]
    contestant = BY_NAME["bf16 oneDNN"].contestant(problem, 1, bounds)
    assert contestant.obstacle.startswith("not on this CPU: oneDNN's bfloat16 needs avx_ne_convert, or avx512_vl")
    untried = dataclasses.replace(contestant, build=lambda: pytest.fail("it was tried"))
    case = Case("one", lambda: torch.ones(1), (untried,))
    (result,) = run_case(case, 2, time.perf_counter).results
    assert (result.status, result.note, result.refused) == ("skipped", contestant.obstacle, False)
    for name in ("avx_ne_convert", "avx512_vl"):
        monkeypatch.setattr(cpu, "features", lambda name=name: frozenset({"avx512_bw", "avx512_dq", name}))
        assert not BY_NAME["bf16 oneDNN"].contestant(problem, 1, bounds).obstacle
    assert not BY_NAME["fp32 oneDNN"].contestant(problem, 1, bounds).obstacle


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs("bfloat16"))])
@pytest.mark.parametrize("shape", [(2, 5, 33), (2, 0, 33), (1, 1, 33)])
def test_packed_linears_take_any_number_of_rows(dtype, shape):
    with torch.no_grad():
        linear = nn.Linear(33, 7).to(dtype)
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(OneDnnLinear(linear)(x), linear(x), atol=2e-2, rtol=2e-2)


def test_float8_linears_compute_the_problem():
    problem = linear_problem(LinearShape(32, 96, 64), "cpu")
    with settings(1):
        model = rivals.replace_linears(problem, rivals.ScaledMM)
        try:
            output = model(*problem.args(torch.bfloat16))
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"torch._scaled_mm on this CPU: {error}")
    assert sqnr(problem.module(*problem.args(torch.float32)), output) > LEAST_SQNR["linear"]["int8"]


def test_replaced_linears_know_their_largest_input():
    problem = linear_problem(FFN, "cpu")
    tops = []

    def make(linear, top):
        tops.append(top)
        return nn.Identity()

    rivals.replace_linears(problem, make)
    x = problem.args(torch.float32)[0]
    hidden = problem.module.blocks[0][:2](x)
    assert tops == [pytest.approx(float(x.abs().max())), pytest.approx(float(hidden.abs().max()))]


def test_planted_outliers_make_channels_stand_out():
    problem = linear_problem(LinearShape(8, 512, 64), "cpu")
    norms = problem.module.blocks[0][0].weight.norm(dim=0)
    assert int((norms > 3 * norms.median()).sum()) == 32


@pytest.mark.parametrize("keys", [12, 31])
def test_a_block_attends_to_its_cache_and_to_itself(keys):
    config = CausalWanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=1, text_len=5)
    problem = block_problem(BlockShape(2, (2, 3), keys, config), "cpu")
    args = list(problem.args(torch.float32))
    out, k, v = problem.module(*args)
    assert out.shape == (1, 12, 64)
    assert k.shape == v.shape == (1, 12, 2, 32)
    assert args[4].shape == (1, keys - 12, 2, 32)
    args[5] = args[5] + 1
    assert torch.equal(problem.module(*args)[0], out) == (keys == 12)


def test_a_broken_layer_of_a_block_is_far_below_the_bound():
    problem = block_problem(QUICK_BLOCKS[0], "cpu")
    args = problem.args(torch.float32)
    for name in ("self_attn.o", "cross_attn.o", "ffn.2"):
        broken = problem.model(torch.float32)
        broken.blocks[0].get_submodule(name).weight.zero_()
        found = sqnr(problem.pick(problem.module(*args)), problem.pick(broken(*args)))
        assert found < LEAST_SQNR["block"]["int8"], (name, found)


@pytest.mark.parametrize(("device", "missing"), [("cpu", "GemLite int8"), ("cuda", "OpenVINO QDQ")])
def test_rivals_take_part_where_they_run(device, missing):
    names = [rival.name for rival in rivals.rivals_for("linear", device)]
    assert names[:2] == list(BASELINES)
    assert missing not in names
    assert missing in BY_NAME


def test_block_rivals_are_those_that_take_any_module():
    names = {rival.name for rival in rivals.rivals_for("block", "cpu")}
    assert "torchao dynamic int8" in names
    assert not any(name.startswith(("onnx", "OpenVINO")) for name in names)
    assert QUICK_BLOCKS[0].rows < QUICK_BLOCKS[0].keys


@pytest.mark.sweep
def test_the_benchmark_imports_no_rival_until_it_builds_one():
    code = (
        "import sys, fxq.cli.bench\n"
        "print([m for m in ('torchao', 'onnx', 'onnxruntime', 'openvino', 'gemlite') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
