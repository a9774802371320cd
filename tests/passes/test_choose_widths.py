import dataclasses
import itertools
import json

import pytest
import torch

import fxq
from fxq.calibration.collect import CalibrationError
from fxq.capture.trace import trace
from fxq.core.config import Budget, RecipeError, Rule, Scheme, with_budget
from fxq.core.facts import Facts
from fxq.core.ir import planned
from fxq.core.rows import Weighting
from fxq.job import Job
from fxq.passes.choose_widths import FACT, ChooseWidths, PredictedError, _Table
from fxq.passes.methods.ranges import MinMax
from fxq.recipes import plain_recipe, recipe_to_toml
from fxq.runtime.progress import Progress
from tests.passes.test_share_inputs import model as siblings
from tests.toys import QUICK, problem, recipe, relative_error, rows, toy, wan_rollout

DATA = [rows(40, 96)]
CALLS: dict[str, list[tuple[str, int]]] = {}


@dataclasses.dataclass(frozen=True)
class Noted:
    """MinMax that notes what it solved."""

    tag: str

    def apply(self, problem, update):
        CALLS.setdefault(self.tag, []).append((problem.layer, problem.scheme.weight_bits))
        return MinMax().apply(problem, update)


def quantized(model=None, weighting="uniform", data=DATA, methods=QUICK, widths=(4, 8), rules=(), **limit):
    chosen = recipe(4, methods=methods, weighting=weighting)
    budget = Budget(widths=widths, **limit)
    chosen = dataclasses.replace(chosen, budget=budget, rules=(*rules, *chosen.rules))
    return fxq.quantize(model or toy(blocks=3), data, chosen, progress=False)


def found(module):
    return Facts.of(module).others[FACT]


def stored_bytes(module):
    """Of quantized linears as they are stored, and of kept ones in bf16."""
    return sum(row.bytes if row.quantized else row.bf16_bytes for row in fxq.summary(module).rows)


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weighting", ["uniform", "gradient"])
@pytest.mark.parametrize("bits", [4, 5.1, 6.66, 8])
def test_the_mean_of_the_bits_is_within_the_budget_and_no_better_choice_is(bits, weighting):
    q = quantized(bits_per_weight=bits, weighting=weighting)
    layers = {row.layer: row for row in fxq.summary(q).quantized}
    width = {layer: int(row.bits[1]) for layer, row in layers.items()}
    assert width == found(q)["layers"] and set(width.values()) <= {4, 8}
    numbers = {layer: row.shape[0] * row.shape[1] for layer, row in layers.items()}
    mean = sum(numbers[layer] * width[layer] for layer in layers) / sum(numbers.values())
    assert found(q)["bits_per_weight"] == pytest.approx(mean) and mean <= bits
    assert found(q)["bytes"] == stored_bytes(q) and found(q)["gap"] == 0
    assert found(q)["error_of"] == ("output" if weighting == "gradient" else "layers")
    errors = {layer: predicted(row.reason) for layer, row in layers.items()}
    names = list(layers)
    best = min(
        sum(errors[name][w] for name, w in zip(names, picks, strict=True))
        for picks in itertools.product((4, 8), repeat=len(names))
        if sum(numbers[name] * w for name, w in zip(names, picks, strict=True)) <= bits * sum(numbers.values())
    )
    assert found(q)["error"] == pytest.approx(best, rel=0.02)  # reasons have three digits


def predicted(reason):
    """{4: error, 8: error} of what the summary says of a layer."""
    assert reason.startswith("predicted error ")
    parts = reason.removeprefix("predicted error ").split(", of ")[0].split(", ")
    return {int(part.split(" at ")[1].split()[0]): float(part.split(" at ")[0]) for part in parts}


def test_the_ratio_is_met_to_the_byte_and_kept_layers_count():
    model = toy(blocks=3)
    whole = sum(row.bf16_bytes for row in fxq.summary(quantized(model, bits_per_weight=8)).rows)
    sizes = [size for size, _ in found(quantized(model, bits_per_weight=8))["frontier"]]
    for size in sizes[1:3]:
        q = quantized(model, ratio=size / whole)
        assert stored_bytes(q) == found(q)["bytes"] <= size
        assert found(q)["ratio"] == stored_bytes(q) / whole
        assert found(quantized(model, ratio=(size - 1) / whole))["bytes"] < size


def test_a_ratio_that_facts_told_allows_the_bytes_it_was_told_of():
    for size, whole in itertools.product(range(1, 60), (7, 97, 15750, 26254)):
        counted, most = _Table([], [], [[size]], 0, whole).limit(Budget(ratio=size / whole))
        assert counted == [[size]] and most == size


def test_the_frontier_falls_and_the_choice_is_not_above_it():
    q = quantized(bits_per_weight=6)
    frontier = found(q)["frontier"]
    for (size, error), (larger, less) in itertools.pairwise(frontier):
        assert size < larger and error >= less
    at_most = [error for size, error in frontier if size <= found(q)["bytes"]]
    assert found(q)["error"] <= min(at_most) * (1 + 1e-12)
    assert json.loads(json.dumps(found(q))) == found(q)


def test_max_error_asks_for_the_least_bytes():
    frontier = found(quantized(bits_per_weight=8))["frontier"]
    for size, error in frontier:
        q = quantized(max_error=error * (1 + 1e-9))
        assert found(q)["error"] <= error * (1 + 1e-9) and found(q)["bytes"] <= size


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"bits_per_weight": 3.9}, "budget: bits_per_weight = 3.9 cannot be met, the least possible is 4: "),
        ({"ratio": 0.1}, r"budget: ratio = 0\.1 cannot be met, the least possible is 0\.[34]"),
        ({"max_error": 0}, r"budget: max_error = 0 cannot be met, the least possible is \d"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_least(limit, message):
    with pytest.raises(RecipeError, match=message):
        quantized(**limit)


def test_what_shapes_rule_out_is_refused_before_anything_is_solved():
    with pytest.raises(RecipeError, match="cannot be met"):
        quantized(bits_per_weight=1, methods=(Noted("early"),))
    assert "early" not in CALLS


@pytest.fixture
def measured(monkeypatch):
    """Kernels of 4, 8 and 16 bits that take 1, 2 and 4 units of time a weight; what was measured."""
    calls = []

    def seconds(size, schemes):
        calls.append((size, schemes))
        units = [4 if scheme is None else scheme.weight_bits / 4 for scheme in schemes]
        return [1e-9 * size.inputs * size.outputs * unit for unit in units]

    monkeypatch.setattr("fxq.passes.kernel_times.kernel_seconds", seconds)
    return calls


@pytest.mark.parametrize(("widths", "time"), [((4, 8), 0.4), ((4, 8, 16), 0.6), ((4, 8), 0.25), ((8, 16), 1)])
def test_the_kernels_time_is_within_the_budget_and_no_better_choice_is(widths, time, measured):
    q = quantized(time=time, widths=widths, model=toy())
    told, plans = found(q), {name: plan for name, (plan, _) in planned(q).items()}
    of = {name: plans[name].in_features * plans[name].out_features for name in told["layers"]}
    names, unit = list(of), {4: 1, 8: 2, 16: 4}

    def share(bits):
        return sum(of[name] * unit[bits[name]] for name in names) / (4 * sum(of.values()))

    assert told["time"] == pytest.approx(share(told["layers"]), rel=1e-9) and told["time"] <= time * (1 + 1e-9)
    everything = quantized(time=1, widths=widths, model=toy())
    errors = {width: {} for width in widths}
    for row in (row for row in fxq.summary(everything).rows if row.layer in of):
        for part in row.reason.removeprefix("predicted error ").split(", "):
            if " bits (" in part:
                error, _, rest = part.partition(" at ")
                errors[int(rest.split(" ")[0])][row.layer] = float(error)
    assert all(len(errors[width]) == len(names) for width in widths), errors
    best = min(
        sum(errors[width][name] for name, width in zip(names, chosen, strict=True))
        for chosen in itertools.product(widths, repeat=len(names))
        if share(dict(zip(names, chosen, strict=True))) <= time * (1 + 1e-9)
    )
    assert told["error"] == pytest.approx(best, rel=0.01), "reasons have three digits"
    assert " ms), " in fxq.summary(q).rows[0].reason


def test_each_size_of_layer_is_measured_once_with_the_rows_of_a_call(measured):
    quantized(time=1)
    sizes = [size for size, _ in measured]
    assert len({(size, tuple(schemes)) for size, schemes in measured}) == len(measured) < 6
    assert {size.rows for size in sizes} == {40} and {size.dtype for size in sizes} == {torch.float32}
    assert all(schemes[-1] is None and len(schemes) == 3 for _, schemes in measured)


@pytest.mark.filterwarnings("ignore")
def test_where_rules_keep_every_layer_nothing_is_measured(measured):
    assert found(quantized(time=1, rules=(Rule("*", None, "kept by the test"),)))["time"] == 1 and not measured


def test_a_time_below_that_of_the_fastest_kernels_is_refused_before_anything_is_solved(measured):
    with pytest.raises(RecipeError, match=r"time = 0\.2 cannot be met, the least possible is 0\.25, as measured"):
        quantized(time=0.2, methods=(Noted("slow"),))
    assert "slow" not in CALLS


def test_the_least_that_is_told_can_be_had():
    with pytest.raises(RecipeError) as refused:
        quantized(ratio=0.1)
    least = float(str(refused.value).split("least possible is ")[1].split(":")[0])
    assert set(found(quantized(ratio=least))["layers"].values()) == {4}


def test_every_candidate_is_solved_once(tmp_path):
    chosen = dataclasses.replace(recipe(4, methods=(Noted("once"),)), budget=Budget(bits_per_weight=6))
    a = fxq.quantize(toy(), DATA, chosen, checkpoint_dir=tmp_path, progress=False)
    want = [(layer, bits) for layer in ("blocks.0.up", "blocks.0.down") for bits in (4, 8)]
    assert CALLS.pop("once") == want
    b = fxq.quantize(toy(), DATA, chosen, checkpoint_dir=tmp_path, progress=False)
    assert "once" not in CALLS and same_tensors(a, b) and found(a) == found(b)
    gradient = dataclasses.replace(chosen, weighting="gradient")
    fxq.quantize(toy(), DATA, gradient, checkpoint_dir=tmp_path, progress=False)
    assert CALLS.pop("once") == want


def test_a_killed_search_goes_on_at_the_candidate_it_was_at(tmp_path):
    chosen = dataclasses.replace(recipe(4, methods=(Noted("killed"),)), budget=Budget(bits_per_weight=6))
    a = fxq.quantize(toy(), DATA, chosen, checkpoint_dir=tmp_path, progress=False)
    CALLS.pop("killed")
    (path,) = [path for path in tmp_path.iterdir() if path.name.startswith("blocks.0.down") and "W8" in path.name]
    kept = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    path.unlink()
    b = fxq.quantize(toy(), DATA, chosen, checkpoint_dir=tmp_path, progress=False)
    assert CALLS.pop("killed") == [("blocks.0.down", 8)]
    assert all(torch.equal(kept[name], tensor) for name, tensor in b.state_dict().items())


def test_layers_that_share_an_input_get_the_same_bits():
    rules = (Rule("blocks.0.q", Scheme(weight_bits=8)),)  # bits of rules do not set layers apart
    q = quantized(siblings(), data=[rows(20, 96)], rules=rules, bits_per_weight=7)
    assert found(q)["layers"] == dict.fromkeys(("blocks.0.q", "blocks.0.k", "blocks.0.v"), 4)
    reasons = {row.reason for row in fxq.summary(q).quantized}
    assert len(reasons) == 1 and reasons.pop().endswith(", of blocks.0.q + blocks.0.k + blocks.0.v")


def test_layers_that_int4_cannot_pack_stay_at_8_bits():
    model, data = toy(hidden=40, blocks=2), [rows(40, 96)]
    q = quantized(model, data=data, bits_per_weight=6.1)
    assert {layer: bits for layer, bits in found(q)["layers"].items() if "down" in layer} == {
        "blocks.0.down": 8,
        "blocks.1.down": 8,
    }
    with pytest.raises(RecipeError, match="the least possible is 6:"):
        quantized(model, data=data, bits_per_weight=5)


def test_a_width_of_16_keeps_layers_in_model_dtype():
    q = quantized(widths=(8, 16), bits_per_weight=12)
    kept = {row.layer: row for row in fxq.summary(q).kept}
    assert {bits for bits in found(q)["layers"].values()} == {8, 16} and found(q)["bytes"] == stored_bytes(q)
    assert {layer for layer, bits in found(q)["layers"].items() if bits == 16} == set(kept) - {"head"}
    assert all("at 16 bits" in row.reason for layer, row in kept.items() if layer != "head")
    assert found(quantized(widths=(4, 8, 16), bits_per_weight=16))["error"] == 0
    assert same_tensors(q, fxq.quantize(toy(blocks=3), DATA, plain_recipe(q), progress=False))


@pytest.mark.parametrize("weighting", ["uniform", "gradient"])
def test_the_saved_recipe_gives_the_same_tensors_without_a_search(weighting, tmp_path):
    q = quantized(bits_per_weight=5.5, weighting=weighting)
    (tmp_path / "plain.toml").write_text(recipe_to_toml(plain_recipe(q)))
    plain = fxq.load_recipe(tmp_path / "plain.toml")
    assert plain.budget is None and len(plain.rules) == 7 and all(rule.rank == 0 for rule in plain.rules)
    again = fxq.quantize(toy(blocks=3), DATA, plain, progress=False)
    assert same_tensors(q, again) and FACT not in Facts.of(again).others
    assert plain_recipe(again) == plain


@pytest.mark.sweep
def test_the_saved_recipe_of_a_rollout_gives_the_same_tensors():
    chosen = with_budget(recipe(4, weighting="gradient"), bits_per_weight=6)
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)
    assert {4, 8} == set(found(q)["layers"].values())
    assert same_tensors(q, fxq.quantize(rollout.denoiser, rollout, plain_recipe(q), progress=False))


def test_a_bundle_keeps_what_was_found(tmp_path):
    q = quantized(bits_per_weight=5.5)
    fxq.save(q, tmp_path / "bundle")
    loaded = fxq.load(tmp_path / "bundle")
    assert found(loaded) == found(q) and torch.equal(loaded(*DATA), q(*DATA))
    assert plain_recipe(loaded) == plain_recipe(q)
    rows_ = {row.layer: row.reason for row in fxq.summary(loaded).quantized}
    assert rows_ == {row.layer: row.reason for row in fxq.summary(q).quantized}
    assert "predicted error" in str(fxq.summary(loaded))


def test_a_larger_budget_has_less_error_in_the_prediction_and_in_the_model():
    model = toy(blocks=3)
    modules = [quantized(model, bits_per_weight=bits, weighting="gradient") for bits in (4, 6, 8)]
    told = [found(module)["error"] for module in modules]
    real = [relative_error(model, module, *DATA) for module in modules]
    assert told[0] > told[1] > told[2] > 0 and real[0] > real[1] > real[2]


def test_the_predicted_error_of_the_last_layer_is_the_models():
    """Behind it nothing is nonlinear: with few outputs the random vector's mean is what is left to chance."""
    model, data = torch.nn.Sequential(torch.nn.Linear(96, 64)).eval(), [rows(400, 96)]
    chosen = fxq.Recipe(
        name="one",
        rules=(Rule("*", Scheme(weight_bits=4)),),
        methods=(MinMax(),),
        weighting="gradient",
        budget=Budget(bits_per_weight=4),
    )
    q = fxq.quantize(model, data, chosen, progress=False)
    with torch.no_grad():
        real = float((model(*data) - q(*data)).double().square().sum()) / 400
    assert found(q)["error"] == pytest.approx(real, rel=0.1)


def test_more_of_the_same_data_changes_no_error():
    one, two = (quantized(data=DATA * n, weighting="gradient", bits_per_weight=6) for n in (1, 4))
    assert found(two)["error"] == pytest.approx(found(one)["error"], rel=0.3)


def test_without_gradients_errors_are_relative_to_each_layers_output():
    large = problem()
    small = dataclasses.replace(large, weight=large.weight / 1024)
    judge, errors = PredictedError(False), []
    for made in (large, small):
        errors.append(float(judge.judge(made, MinMax().apply(made, None), [5, 8], ())["error"]))
    assert errors[0] == pytest.approx(errors[1]) and 0 < errors[0] < 2


def test_a_budget_needs_data():
    chosen = with_budget(fxq.PRESETS["w4a8-dynamic"], bits_per_weight=5)
    with pytest.raises(CalibrationError, match="has a budget, and errors of layers are measured on data"):
        fxq.quantize(toy(), None, chosen, example_inputs=DATA[0])
    graph = trace(toy(), (rows(9, 96),))
    job = Job(chosen, Progress(False))
    job.plan(graph)
    job.calibrate(graph, None)
    with pytest.raises(ValueError, match=r"calibration rows of every layer, and blocks\.0\.up has none"):
        job.choose_integers(graph)


def test_scales_per_token_are_chosen_for_too():
    rules = tuple(
        dataclasses.replace(rule, scheme=rule.scheme and dataclasses.replace(rule.scheme, per_token=True))
        for rule in recipe(4).rules
    )
    chosen = dataclasses.replace(recipe(4), rules=rules, budget=Budget(bits_per_weight=6))
    q = fxq.quantize(toy(blocks=3), DATA, chosen, progress=False)
    assert {row.bits for row in fxq.summary(q).quantized} == {"W4A8 per token", "W8A8 per token"}
    assert found(q)["bytes"] == stored_bytes(q)


def test_the_pass_stands_in_the_place_of_the_methods():
    job = Job(with_budget(recipe(), bits_per_weight=5), Progress(False))
    names = [step.name for step in job.line()]
    assert "ChooseWidths" in names and "ApplyMethods" not in names
    assert "ApplyMethods" in [step.name for step in job.line(first_only=True)]
    assert isinstance(job.chooser(job.methods()), ChooseWidths)
    graph = trace(toy(), (rows(9, 96),))
    job.plan(graph)
    assert {plan.scheme.weight_bits for plan, _ in planned(graph.module).values() if plan.scheme} == {8}
    assert Weighting(job.recipe.weighting) is job.methods().weighting


@pytest.mark.sweep
def test_sensitivities_weigh_the_rows_of_a_budget_too():
    rollout = wan_rollout()
    chosen = with_budget(recipe(4, weighting="sensitivity"), bits_per_weight=6)
    q = fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)
    alpha = Facts.of(q).sensitivity
    again = fxq.quantize(rollout.denoiser, rollout, plain_recipe(q), sensitivity=alpha, progress=False)
    assert same_tensors(q, again)
