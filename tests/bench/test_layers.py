import dataclasses
import tomllib

import pytest
import torch

import fxq
from fxq import numerics
from fxq.bench.contest import BF16, FP32, CaseResult, Result, run_case
from fxq.bench.layers import Advice, Site, advise, layer_case, model_cases, rules_text, sites_of
from fxq.core.ir import planned
from fxq.recipes import recipe_from_json
from fxq.runtime.timing import settings
from tests.toys import recipe, wan_rollout


@pytest.fixture(scope="module")
def rollout():
    return wan_rollout()


@pytest.fixture(scope="module", params=[(8, False), (4, False), (8, True)], ids=["w8", "w4", "w8-per-token"])
def module(request, rollout):
    bits, per_token = request.param
    return fxq.quantize(rollout.denoiser, rollout, recipe(bits=bits, per_token=per_token), progress=False)


def test_rows_are_those_of_the_rollout_and_not_of_the_example(module, rollout):
    rows = {site.plan.layer: site.rows for site in sites_of(module, rollout)}
    # 2 videos, chunks of 2 frames with 2 x 3 tokens; text of 5 tokens on the first call only.
    assert rows["blocks.0.ffn.0"] == 2 * 2 * 6
    assert rows["blocks.0.cross_attn.k"] == rows["text_embedding.0"] == 2 * 5
    assert "head.head" not in rows


def test_layers_of_one_shape_are_measured_once(module, rollout):
    cases = model_cases(module, rollout, "cpu")
    layers = [layer for case in cases for layer in case.facts["layers"]]
    assert len(layers) == len(set(layers)) == len([p for p, _ in planned(module).values() if p.scheme])
    assert len(cases) < len(layers)


@pytest.mark.parametrize("layer", ["blocks.0.self_attn.q", "blocks.0.ffn.2"])
def test_both_sides_of_a_layer_compute_the_same(module, layer):
    plan = planned(module)[layer][0]
    assert bool(plan.outliers) == (layer == "blocks.0.self_attn.q")
    with settings(1):
        result = run_case(layer_case(module, [Site(plan, 7)], "cpu"), 5, iter(range(1000)).__next__)
    assert [r.status for r in result.results] == ["ok"] * 3, result.results
    assert all(r.sqnr > 35 for r in result.results)


def test_a_layer_with_another_weight_than_its_integers_say_is_wrong(module, monkeypatch):
    plan = planned(module)["blocks.0.ffn.2"][0]
    right = numerics.dequantize_weight
    monkeypatch.setattr(numerics, "dequantize_weight", lambda *args: right(*args).flip(0))
    with settings(1):
        result = run_case(layer_case(module, [Site(plan, 7)], "cpu"), 5, iter(range(1000)).__next__)
    assert result.results[-1].status == "wrong"


def measured(fp32, bf16, ours):
    results = [Result(n, "ok", seconds=(s,) * 5) for n, s in ((FP32, fp32), (BF16, bf16), ("fxq", ours)) if s]
    return CaseResult("case", {"layers": ["a.0", "b.1"], "rows": 1}, tuple(results))


@pytest.mark.parametrize(
    ("times", "ratio", "text"),
    [
        ((8.0, 4.0, 2.0), 2.0, ""),
        ((8.0, 2.0, 4.0), 0.5, "stay in bf16: M=1"),
        ((1.0, 2.0, 4.0), 0.25, "stay in fp32: M=1"),
        ((8.0, None, 2.0), 4.0, ""),
    ],
)
def test_advice_compares_with_the_faster_float_linear(times, ratio, text):
    advice = advise(measured(*times))
    assert (advice.ratio, advice.text) == (ratio, text)


def test_there_is_no_advice_without_a_measurement():
    assert advise(measured(8.0, 4.0, None)) is None


def test_rules_keep_exactly_the_losing_layers_in_a_recipe():
    gains, loses = Advice(("a.0",), 75, 2.0, ""), Advice(("b.0", "b.1"), 1, 0.5, "bf16")
    text = rules_text([gains, loses])
    base = dataclasses.asdict(recipe()) | {"methods": [{"method": "MinMax"}], "rules": []}
    kept = recipe_from_json({**base, **tomllib.loads(text)})
    assert [(rule.pattern, rule.scheme) for rule in kept.rules] == [("b.0", None), ("b.1", None)]
    assert kept.rules[0].reason == "int8 is slower than bf16 at 1 row"
    assert rules_text([gains]) == ""


def test_layers_that_never_get_a_row_are_left_out(module, rollout, monkeypatch):
    empty = {"prompt_embeds": torch.zeros(2, 0, rollout.model.config.text_dim)}
    monkeypatch.setattr(rollout, "batches", ((empty, rollout.batches[0][1]),))
    monkeypatch.setattr(rollout.model, "config", dataclasses.replace(rollout.model.config, text_len=0))
    layers = {site.plan.layer for site in sites_of(module, rollout)}
    assert "blocks.0.ffn.0" in layers
    assert "blocks.0.cross_attn.k" not in layers
