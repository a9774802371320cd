import copy
import dataclasses
import gc
import os
import pathlib
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxq
from fxq.cache.policy import CachePolicy
from fxq.integrations import content
from fxq.integrations import torch_compile as backend
from fxq.integrations.binding import BackendError, bind
from fxq.integrations.dynamo_graph import operands
from fxq.integrations.torch_compile import _context, fxq_backend
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.numerics import fold_offset
from tests.passes.test_share_inputs import model as siblings
from tests.toys import Block, recipe, relative_error, rows, toy, wan_rollout

DATA = [rows(6, 96, seed=seed) for seed in range(3)]
PLAIN = recipe(weighting="uniform")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch):
    """The rewritten graphs with their options; they run as they are, without inductor."""
    found = []

    def run_eagerly(gm, inputs, config_patches):
        found.append((gm, inputs, config_patches))
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", run_eagerly)
    return found


def quantize(model):
    return fxq.quantize(model, DATA, PLAIN, progress=False)


@pytest.fixture(scope="module")
def pair():
    model = toy(blocks=3)
    return model, quantize(model)


def uneven():
    """A model whose second block has no outlier channels: another graph for the same code."""
    model = toy(blocks=3)
    with torch.no_grad():
        model.blocks[1].up.weight[:, 3:35:4] /= 6
    return model


def compile_whole(model, chosen, **options):
    return torch.compile(model, backend=fxq_backend, options={"fxq.recipe": chosen, **options})


def compile_blocks(model, chosen):
    for block in model.blocks:
        block.compile(backend=fxq_backend, options={"fxq.recipe": chosen})
    return model


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("form", ["folder", "module", "binding"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_whole_model_computes_what_the_quantized_graph_does(pair, compiled, form, grad, tmp_path):
    model, quantized = pair
    chosen = {
        "folder": lambda: str(fxq.save(quantized, tmp_path / "bundle")),
        "module": lambda: quantized,
        "binding": lambda: bind(model, quantized),
    }[form]()
    x = rows(6, 96)
    with torch.set_grad_enabled(grad):
        got = compile_whole(model, chosen)(x)
    torch.testing.assert_close(got, quantized(x), rtol=1e-5, atol=1e-5)
    assert targets(compiled[0][0]).count("fxq.dual_scale_linear.default") == 6


def test_blocks_that_share_compiled_code_keep_their_own_weights(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    compile_blocks(model, bind(model, quantized))
    assert relative_error(quantized, model, rows(6, 96)) < 1e-5
    assert counters["stats"]["unique_graphs"] == len(compiled) == 1


def test_a_block_of_another_kind_gets_a_graph_whose_sizes_stay_dynamic(compiled):
    model = uneven()
    quantized = quantize(model)
    compile_blocks(model, bind(model, quantized))
    for batch in (6, 7, 8, 9):
        assert relative_error(quantized, model, rows(batch, 96)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2
    assert len(compiled) == 4
    assert all(any(isinstance(value, torch.SymInt) for value in inputs) for _, inputs, _ in compiled[2:])


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(96, 64), Block(96, 64)
        self.breaks = False

    def forward(self, x):
        x = self.first(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(x)


def test_a_graph_break_splits_the_model_and_changes_nothing_else(compiled):
    model = Broken().eval()
    quantized = quantize(model)
    model.breaks = True
    assert relative_error(quantized, compile_whole(model, quantized), rows(6, 96)) < 1e-5
    assert counters["graph_break"]
    assert len(compiled) == 2


class SharedInput(nn.Module):
    def __init__(self, writes=False):
        super().__init__()
        self.writes = writes
        self.block = nn.ModuleList([nn.ModuleDict({n: nn.Linear(96, 32) for n in ("q", "k", "v")})])

    def forward(self, x):
        part, h = self.block[0], x.sin()
        y = part["q"](h)
        if self.writes:
            h.mul_(2)
        return y + part["k"](h) + part["v"](h)


@pytest.mark.parametrize(("writes", "quantizations"), [(False, 1), (True, 2)])
def test_linears_of_one_input_share_its_integers_unless_it_is_written_between(writes, quantizations, compiled):
    model = SharedInput(writes).eval()
    chosen = quantize(model)
    layers, _ = backend.read_layers(chosen)
    for layer in layers.values():
        bias = layer.float_bias()
        layer.input_scale.fill_(0.02)
        layer.input_zero_point.fill_(3)
        scales = layer.weight_scale, layer.input_scale, layer.input_zero_point
        layer.offset.copy_(fold_offset(bias, layer.codes(), *scales, layer.split))
    got = compile_whole(model, chosen)(rows(6, 96))
    torch.testing.assert_close(got, chosen(rows(6, 96)), rtol=1e-5, atol=1e-5)
    assert targets(compiled[0][0]).count("fxq.quantize_act.default") == quantizations


def edit_weight(model):
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] += 1


def edit_bias(model):
    with torch.no_grad():
        model.blocks[1].up.bias.add_(1)


def replace_data(model):
    model.blocks[1].up.weight.data = model.blocks[1].up.weight.data.clone()


def cast(model):
    model.blocks[1].bfloat16()


def weight_of(model):
    return model.blocks[1].up.weight


def merge_as_peft(model):
    weight_of(model).data += torch.randn(64, 2) @ torch.randn(2, 96)


def edit_one_number(model):
    weight_of(model).detach().numpy()[5, 7] += 1


def add_to_all(model):
    with torch.no_grad():
        torch._foreach_add_([model.blocks[1].up.weight, model.blocks[1].up.bias], 0.5)


def step(model):
    weight_of(model).grad = torch.ones(64, 96)
    torch.optim.SGD([weight_of(model)], 0.1).step()


def set_storage(model):
    with torch.no_grad():
        weight_of(model).set_(torch.ones(64, 96))


def other_bias(model):
    model.blocks[1].up.bias = nn.Parameter(torch.ones(64))


def no_bias(model):
    model.blocks[1].up.bias = None


EDITS = {
    "weight": edit_weight,
    "bias": edit_bias,
    "replaced data": replace_data,
    "cast": cast,
    "data mul_": lambda m: weight_of(m).data.mul_(1.5),
    "data +=": merge_as_peft,
    "data copy_": lambda m: weight_of(m).data.copy_(torch.randn(64, 96)),
    "data of a view": lambda m: weight_of(m).data.t()[3].zero_(),
    "rows swapped": lambda m: weight_of(m).data.copy_(weight_of(m).detach().flip(0)),
    "columns swapped": lambda m: weight_of(m).data.copy_(weight_of(m).detach().roll(1, 1)),
    "one number by numpy": edit_one_number,
    "numpy": lambda m: weight_of(m).detach().numpy().fill(0.25),
    "numpy of the bias": lambda m: m.blocks[1].up.bias.detach().numpy().__imul__(2),
    "bias data +=": lambda m: m.blocks[1].up.bias.data.add_(1),
    "storage": lambda m: weight_of(m).untyped_storage().copy_(torch.ones(64, 96).untyped_storage()),
    "set_": set_storage,
    "foreach": add_to_all,
    "optimizer": step,
    "another bias": other_bias,
    "no bias": no_bias,
    "loaded state": lambda m: m.load_state_dict(toy(seed=9, blocks=3).state_dict()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_or_bias_edited_after_it_was_bound_is_refused(edit, grad, pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    run = compile_whole(model, bind(model, quantized))
    with torch.set_grad_enabled(grad):
        before = run(rows(6, 96))
        assert torch.equal(run(rows(6, 96)), before)
        edit(model)
        with pytest.raises(
            (BackendError, BackendCompilerFailed), match=r"blocks\.\d\.(up|down)\.(weight|bias) (was|is)"
        ):
            run(rows(6, 96))


@pytest.mark.parametrize("edit", [merge_as_peft, edit_one_number, other_bias, no_bias, EDITS["bias data +="]])
def test_an_edit_between_binding_and_the_first_call_is_refused(edit, pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    run = compile_whole(model, bind(model, quantized))
    edit(model)
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\.up\.(weight|bias) (was|is)"):
        run(rows(6, 96))


def test_edits_under_inference_mode_are_refused_too(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    run = compile_whole(model, bind(model, quantized))
    with torch.inference_mode():
        run(rows(6, 96))
        weight_of(model).mul_(2)
        with pytest.raises((BackendError, BackendCompilerFailed), match=r"blocks\.1\.up\.weight was edited"):
            run(rows(6, 96))


def test_a_large_weight_is_looked_at_whole_within_a_few_calls(monkeypatch, pair):
    monkeypatch.setattr(content, "SLICE", 8 * 1021)
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    binding = bind(model, quantized)
    linear = model.blocks[1].up
    assert len(binding.find(linear.weight).sums) == 4
    for _ in range(5):
        binding.layer_of(linear.weight, linear.bias)
    edit_one_number(model)
    with pytest.raises(BackendError, match=r"blocks\.1\.up\.weight was edited"):
        for _ in range(4):
            binding.layer_of(linear.weight, linear.bias)
    model = copy.deepcopy(pair[0])
    fresh, linear = bind(model, quantized), model.blocks[1].up
    merge_as_peft(model)
    with pytest.raises(BackendError, match=r"blocks\.1\.up\.weight was edited"):
        fresh.layer_of(linear.weight, linear.bias)


class ComputedBias(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.blocks, self.head = inner.blocks, inner.head

    def forward(self, x):
        up, down = self.blocks[0].up, self.blocks[0].down
        return self.head(x + down(nn.functional.gelu(nn.functional.linear(x, up.weight, up.bias * 2))))


def test_a_kept_layer_may_be_edited(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    run = compile_whole(model, bind(model, quantized))
    before = run(rows(6, 96))
    with torch.no_grad():
        model.head.bias.add_(1)
    torch.testing.assert_close(run(rows(6, 96)), before + 1)


def test_binding_again_takes_a_weight_that_was_moved(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    replace_data(model)
    run = compile_whole(model, bind(model, quantized))
    assert relative_error(quantized, run, rows(6, 96)) < 1e-5


def test_another_model_of_the_same_class_is_refused(pair, compiled):
    model, quantized = pair
    with pytest.raises(BackendCompilerFailed, match=r"not bound to a bundle.*fxq\.bind\(model, bundle\)"):
        compile_whole(toy(seed=5, blocks=3), bind(model, quantized))(rows(6, 96))
    with pytest.raises(BackendCompilerFailed, match=r"steps from the bundle's integers"):
        compile_whole(toy(seed=5, blocks=3), quantized)(rows(6, 96))


def test_a_block_that_shares_code_with_a_bound_one_is_refused_when_it_is_not_bound(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    chosen = bind(model, quantized)
    compile_blocks(model, chosen)(rows(6, 96))
    model.blocks[1].up.weight = nn.Parameter(model.blocks[1].up.weight.detach().clone())
    with pytest.raises((BackendError, BackendCompilerFailed), match=r"not bound to a bundle"):
        model(rows(6, 96))


def test_a_part_compiled_by_name_is_refused_with_what_to_do(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    with pytest.raises(
        BackendCompilerFailed, match=r"does not know the linear with the weight 'up\.weight'.*fxq\.bind"
    ):
        compile_blocks(model, quantized)(rows(6, 96))


def test_a_linear_that_was_not_there_at_calibration_is_refused(pair, compiled):
    model = copy.deepcopy(pair[0])
    model.head = nn.Sequential(nn.Linear(96, 5), nn.Linear(5, 7))
    with pytest.raises(BackendCompilerFailed, match=r"does not know the linear with the weight 'head\.0\.weight'"):
        compile_whole(model, pair[1])(rows(6, 96))


class ReadsWeight(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.blocks, self.head = inner.blocks, inner.head

    def forward(self, x):
        block = self.blocks[0]
        return self.head(x + block.down(nn.functional.linear(x, block.up.weight[:64], block.up.bias)))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.blocks, self.head = inner.blocks, inner.head

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (ReadsWeight, r"blocks\.0\.up\.weight is read by .* not by a linear as its weight"),
        (Checkpointed, r"turn off activation checkpointing"),
        (ComputedBias, r"the bias of blocks\.0\.up\.weight is computed by mul"),
    ],
)
def test_linears_that_cannot_be_replaced_are_refused(wrap, reason, pair, compiled):
    with pytest.raises(BackendCompilerFailed, match=reason):
        compile_whole(wrap(pair[0]), pair[1])(rows(6, 96))


def test_constant_weights_are_refused(pair, compiled):
    with (
        torch._inductor.config.patch(freezing=True),
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match=r"is a constant: turn off torch\._inductor\.config\.freezing"),
    ):
        compile_whole(*pair)(rows(6, 96))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fxq.recpie": "x"}, r"no option 'fxq\.recpie'; did you mean 'fxq\.recipe'"),
        ({"max_autotun": True}, r"no option 'max_autotun'; did you mean 'max_autotune'"),
        ({"qqqqqqqq": True}, r"no option 'qqqqqqqq'; it knows 'fxq\.recipe' and the options of inductor"),
        ({}, r"runs calibrated models only: quantize the model with fxq\.quantize"),
        ({"fxq.recipe": "/nowhere/bundle"}, r"nowhere/bundle/manifest\.json: No such file"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(options, reason, pair):
    with pytest.raises(BackendCompilerFailed, match=reason):
        torch.compile(pair[0], backend=fxq_backend, options=options)(rows(6, 96))


def test_a_mode_is_refused(pair):
    with pytest.raises(BackendCompilerFailed, match=r"takes options, not mode='max-autotune'"):
        torch.compile(pair[0], backend=fxq_backend, mode="max-autotune")(rows(6, 96))


def test_options_of_inductor_reach_it(pair, compiled):
    compile_whole(*pair, **{"epilogue-fusion": False, "max_autotune": True})(rows(6, 96))
    assert compiled[0][2] == {"epilogue_fusion": False, "max_autotune": True}


def test_a_binding_does_not_keep_the_model_alive_and_takes_no_twin_for_it(pair):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    chosen, twin = bind(model, quantized), nn.Parameter(model.blocks[0].up.weight.detach().clone())
    assert chosen.layer_of(model.blocks[0].up.weight, model.blocks[0].up.bias) is not None
    with pytest.raises(BackendError, match="not bound"):
        chosen.layer_of(twin, model.blocks[0].up.bias)
    weight = weakref.ref(model.blocks[0].up.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_late_graph_that_narrows_the_sizes_is_refused():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with pytest.raises(BackendError, match="need different input sizes; compile with dynamic=False"), _context(mode):
        mode.shape_env.guards.append(None)


def test_layers_that_no_compiled_code_has_used_are_listed(pair, compiled):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    chosen = bind(model, quantized)
    assert len(chosen.unserved()) == 6
    for block in model.blocks[:2]:
        block.compile(backend=fxq_backend, options={"fxq.recipe": chosen})
    model(rows(6, 96))
    assert chosen.unserved() == ["blocks.2.up", "blocks.2.down"]


def test_the_operands_of_layers_follow_the_graph(pair):
    layers, _ = backend.read_layers(pair[1])
    up = layers["blocks.0.up"]
    assert len(operands([None, up, None])) == 6
    assert len(operands([up, layers["blocks.1.up"]])) == 12


def rollout_errors(rollout, quantized, run):
    """Relative error of every call, and after every chunk how many graphs Dynamo has captured."""
    errors, graphs = [], []

    def both(*args):
        want, got = quantized(*args)[0], run(*args)[0]
        errors.append(float((want - got).norm() / want.norm()))
        return quantized(*args)

    with rollout.using(both):
        rollout.rollout(*rollout.batches[0], lambda call, _: graphs.append(counters["stats"]["unique_graphs"]))
    return torch.tensor(errors), graphs


def compile_parts(model, chosen):
    """Every block of a causal Wan, and the linears that are called outside of the forward of one."""
    model.text_embedding = compile_whole(model.text_embedding, chosen)
    for block in compile_blocks(model, chosen).blocks:
        block.cross_attn.kv = compile_whole(block.cross_attn.kv, chosen)
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("parts", ["whole", "blocks"])
def test_with_inductor_a_windowed_rollout_is_compiled_in_its_first_window_only(parts):
    rollout = wan_rollout(frames=18)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=CachePolicy(window=6))
    model = rollout.denoiser
    quantized = fxq.quantize(model, rollout, PLAIN, progress=False)
    chosen = bind(model, quantized)
    run = compile_whole(model, chosen) if parts == "whole" else compile_parts(model, chosen)
    errors, graphs = rollout_errors(rollout, quantized, run)
    assert not chosen.unserved()
    assert errors.median() < 1e-5 and errors.square().mean().sqrt() < 1e-3, errors
    window = 3 * 3
    assert graphs[-1] == graphs[window - 1] <= 8, graphs


@pytest.mark.sweep
def test_with_inductor_blocks_of_the_tiny_model_compile_once():
    rollout, _ = tiny_rollout(load_tiny(), 1, seed=1, unseen=False)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=CachePolicy(window=6))
    model = rollout.denoiser
    quantized = fxq.quantize(model, rollout, PLAIN, progress=False)
    chosen = bind(model, quantized)
    run = compile_parts(model, chosen)
    errors, graphs = rollout_errors(rollout, quantized, run)
    assert not chosen.unserved()
    # A rounding that flips by one step of one activation is all that may differ.
    assert errors.median() < 1e-5 and errors.max() < 2e-2, errors
    assert graphs[-1] == graphs[2 * 5 - 1] <= 8, graphs


@pytest.mark.sweep
def test_with_inductor_a_block_of_another_kind_follows_dynamic_sizes():
    model = uneven()
    quantized = quantize(model)
    compile_blocks(model, bind(model, quantized))
    for batch in (6, 7, 9):
        assert relative_error(quantized, model, rows(batch, 96)) < 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("parts", ["whole", "blocks"])
def test_with_inductor_a_transformer_of_diffusers_is_right(parts):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval().requires_grad_(False)  # fmt: skip
    calls = [
        {
            "hidden_states": rows(1, 4, 2, 8, 8, seed=seed),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": rows(1, 7, 32, seed=seed + 9),
            "return_dict": False,
        }
        for seed in range(3)
    ]
    quantized = fxq.quantize(model, calls, PLAIN, progress=False)
    chosen = bind(model, quantized)
    run = compile_whole(model, chosen) if parts == "whole" else compile_blocks(model, chosen)
    if parts == "blocks":
        model.condition_embedder.compile(backend=fxq_backend, options={"fxq.recipe": chosen})
    for call in calls:
        with torch.no_grad():
            want, got = quantized(**call)[0], run(**call)[0]
        assert (want - got).norm() / want.norm() < 1e-3
    assert not chosen.unserved()


@pytest.mark.sweep
def test_an_installed_entry_point_makes_the_backend_known_by_name(tmp_path):
    info = tmp_path / "fxq_installed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxq-installed\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\nfxq = fxq.integrations.torch_compile:fxq_backend\n"
    )
    root = pathlib.Path(__file__).parents[2]
    script = "import torch; torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), backend='fxq')(torch.ones(1, 2))"
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **paths}, capture_output=True, text=True)
    assert "backend fxq runs calibrated models only" in done.stderr


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_with_scales_per_token_are_compiled(bits, asymmetric, compiled):
    model = toy(blocks=2)
    chosen = recipe(bits, per_token=True, asymmetric=asymmetric)
    module = fxq.quantize(model, None, chosen, example_inputs=DATA[0], progress=False)
    compile_blocks(model, fxq.bind(model, module))
    assert torch.equal(model(DATA[1]), module(DATA[1]))
    called = [name for gm, *_ in compiled for name in targets(gm)]
    assert called.count("fxq.dual_scale_linear_per_token.default") == 2 and "fxq.quantize_act.default" not in called


def test_linears_on_one_input_share_what_is_measured_of_it(compiled):
    model = siblings()
    module = fxq.quantize(model, None, recipe(per_token=True), example_inputs=DATA[0], progress=False)
    got = compile_whole(model, module)(DATA[1])
    assert all(torch.equal(a, b) for a, b in zip(got, module(DATA[1]), strict=True))
    called = [name for gm, *_ in compiled for name in targets(gm)]
    assert called.count("fxq.quantize_per_token.default") == 1
    assert called.count("fxq.dual_scale_linear_per_token.default") == 3


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_inductor_compiles_layers_with_scales_per_token(asymmetric):
    model = toy(blocks=2)
    chosen = recipe(4, per_token=True, asymmetric=asymmetric)
    module = fxq.quantize(model, None, chosen, example_inputs=DATA[0], progress=False)
    assert relative_error(module, compile_whole(model, module), DATA[1]) < 1e-5
