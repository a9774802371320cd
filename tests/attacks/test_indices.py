"""Attacks 3 and 5: numbers that index memory, and graphs that load and fail only when they are called."""

import json

import pytest
import torch

import fxq
from fxq.export import verify_bundle
from tests.attacks.corpus import edit_json, edit_tensors, first

PERM = "blocks.0.up.perm"


def refused(bundle, message):
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)
    verdict = verify_bundle(bundle)
    assert not verdict.ok and not verdict.layers, "verify must not run what load refuses"


@pytest.mark.parametrize("entry", [5000, -5, -(2**31), 2**31 - 1, 0, 95, 96])
def test_a_permutation_is_the_one_of_the_plan(bundle, entry):
    def edit(tensors):
        tensors[PERM][17 if entry != 95 else 3] = entry

    edit_tensors(bundle, edit)
    refused(bundle, "blocks.0.up: perm is not the order of normal channels and outliers")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_scale", 0.0, "input_scale is no float32 of finite numbers above 0"),
        ("input_scale", -1.0, "input_scale is no float32 of finite numbers above 0"),
        ("input_scale", float("nan"), "finite"),
        ("input_scale", float("inf"), "finite"),
        ("input_scale", 1e-45, "input_scale is no float32 of finite numbers above 0"),
        ("weight_scale", 0.0, "weight_scale is no float32 of finite numbers above 0"),
        ("weight_scale", -0.1, "weight_scale is no float32 of finite numbers above 0"),
        ("offset", float("inf"), "not finite"),
        ("input_zero_point", 2**21, "not below 2097152 in absolute value"),
        ("input_zero_point", -(2**31), "not below 2097152 in absolute value"),
    ],
)
def test_scales_offsets_and_zero_points_are_in_range(bundle, name, value, message):
    def edit(tensors):
        tensors[f"blocks.0.down.{name}"].view(-1)[0] = value

    edit_tensors(bundle, edit)
    refused(bundle, message)


def test_scales_whose_integer_sums_overflow_are_refused(bundle):
    def edit(tensors):
        tensors["blocks.0.up.input_scale"][1] *= 1e9

    edit_tensors(bundle, edit)
    refused(bundle, "integer sums may not fit 32 bits")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.0.up.perm", torch.arange(96).int()[:95], "perm is|expected int32"),
        ("blocks.0.up.perm", torch.arange(96), "perm is|expected int32"),
        ("blocks.0.up.weight", torch.zeros(64, 47, dtype=torch.uint8), r"weight \(64, 47\), expected \(64, 48\)"),
        ("blocks.0.up.weight", torch.zeros(64, 48, dtype=torch.int8), "weight dtype torch.int8"),
        ("blocks.0.up.weight_scale", torch.ones(1, 64), "expected 2 groups"),
        ("blocks.0.up.input_zero_point", torch.zeros(2), "input_zero_point is torch.float32"),
        ("blocks.0.up.offset", torch.zeros(64, dtype=torch.float64), "offset is torch.float64"),
        ("head.weight", torch.zeros(7, 95), "does not fit its arguments"),
        ("head.weight", torch.zeros(7, 96, dtype=torch.float64), "of one dtype"),
        ("head.bias", torch.zeros(8), "does not fit its arguments"),
    ],
)
def test_tensors_fit_the_operators_that_read_them(bundle, name, tensor, message):
    edit_tensors(bundle, lambda tensors: tensors.update({name: tensor}))
    refused(bundle, message)


CONSTANTS = [(5, 32), (5, 0), (5, -1), (5, 2**40), (5, True), (5, 64.0), (6, 8), (6, 5), (6, True), (6, -4)]


@pytest.mark.parametrize(("position", "value"), CONSTANTS)
def test_split_and_bits_of_a_product_are_the_plans(bundle, position, value):
    edit_json(
        bundle, "graph.json", lambda d: first(d, "dual_scale").update(args=_at(first(d, "dual"), position, value))
    )
    refused(bundle, "the plan says|expected|storage")


@pytest.mark.parametrize("value", [1, 9, -8, 2**40, True])
def test_bits_of_inputs_are_in_range(bundle, value):
    edit_json(bundle, "graph.json", lambda d: first(d, "quantize").update(args=_at(first(d, "quantize"), 5, value)))
    refused(bundle, "expected|the plan says")


def _at(node, position, value):
    return [*node["args"][:position], value, *node["args"][position + 1 :]]


PLANS = {
    "in_features": (0, -96, 2**17, 95, True, "96", 1e9),
    "out_features": (0, 2**40, 65),
    "outliers": ([95, 3], [0, 0], [-1], [96], list(range(96)), ["1"], [1.5]),
    "output_sqnr": ("high", [], True),
    "reason": (7, "x" * 9999, "\x1b[2J"),
    "layer": ("blocks.0.down", "../x", "", 5),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in PLANS.items() for value in values])
def test_a_plan_has_sizes_and_channels_that_agree_with_its_tensors(bundle, field, value):
    edit_json(bundle, "graph.json", lambda data: first(data, "dual_scale")["plan"].update({field: value}))
    edit_json(bundle, "manifest.json", lambda data: data["layers"]["blocks.0.up"]["plan"].update({field: value}))
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight_bits", True), ("input_bits", 8.0), ("tau", float("nan")), ("align", "32"), ("alpha", [])],
)
def test_a_scheme_is_of_the_right_types(bundle, field, value):
    edit_json(bundle, "graph.json", lambda data: first(data, "dual_scale")["plan"]["scheme"].update({field: value}))
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


def test_an_operator_of_fxq_outside_a_planned_layer_is_refused(bundle):
    def edit(data):
        node = first(data, "quantize_act")
        data["nodes"].insert(data["nodes"].index(node) + 1, node | {"name": "again"})

    edit_json(bundle, "graph.json", edit)
    refused(bundle, "is read by more than its layer|belongs to no planned layer")


def test_a_layer_reads_its_own_tensors(bundle):
    def edit(data):
        first(data, "dual_scale")["args"][1] = first(data, "dual_scale")["args"][4]

    edit_json(bundle, "graph.json", edit)
    refused(bundle, "weight is blocks_0_up_offset, expected blocks.0.up.weight|not read stored tensors|expected")


LATE = {
    "another operator": lambda d: first(d, "gelu").update(target="aten.embedding.default", args=_x(d) * 2),
    "another shape": lambda d: first(d, "gelu").update(target="aten.view.default", args=[*_x(d), {"list": [7, 11]}]),
    "a dimension": lambda d: first(d, "gelu").update(target="aten.softmax.int", args=[*_x(d), 5]),
    "a dtype": lambda d: first(d, "gelu").update(target="aten.to.dtype", args=[*_x(d), {"dtype": "int64"}]),
    "swapped": lambda d: first(d, "linear.default").update(args=first(d, "linear.default")["args"][::-1]),
    "more outputs": lambda d: d.update(
        out_spec=[1, {"type": "builtins.tuple", "context": "null", "children_spec": [d["out_spec"][1]] * 2}]
    ),
}


def _x(data):
    return [{"node": next(n["name"] for n in data["nodes"] if n["op"] == "placeholder")}]


@pytest.mark.parametrize("case", LATE)
def test_a_call_that_cannot_work_is_refused_while_loading(bundle, case):
    edit_json(bundle, "graph.json", LATE[case])
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


FACTS = {
    "inputs": [None, {}, [], [[1, 2, 3]], [{"value": "x"}], [[-1, 96]], [["9", 96]], [[None, 95]], "text", [[1.5, 96]]],
    "recipe": [None, [], {}, {"name": 7}, "w4a8"],
    "passes": [None, {}, [["x"]], [[1, "x"]], "abc"],
    "environment": [None, [], {"torch": 2}],
    "calibration_hash": [None, 5, [], "x" * 9999],
    "sensitivity": ["x", {"a": 1}, [None], [["1"]]],
    "never_called": [None, "abc", [1], [[]], 7],
    "remarks": [{}, {"x": ["y"]}],
    "parallel": [{}],
}


@pytest.mark.parametrize(("name", "value"), [(n, json.dumps(v)) for n, values in FACTS.items() for v in values])
def test_facts_of_a_wrong_type_are_refused(bundle, name, value):
    edit_json(bundle, "manifest.json", lambda data: data["facts"].update({name: json.loads(value)}))
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


MARKS = {
    "seed": [-1, 2**31, 2**70, 1.5, "1", None],
    "tolerance": [-1, 1, 1e9, "0.01", float("nan"), float("inf")],
    "outputs": [None, [{}], [{"dtype": "load", "shape": [1], "norm": 1, "projections": [1, 1, 1, 1]}], 7],
    "reason": [7, "x" * 9999],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in MARKS.items() for v in values])
def test_a_fingerprint_of_a_wrong_type_is_refused(bundle, name, value):
    edit_json(bundle, "manifest.json", lambda data: data["fingerprint"].update({name: value}))
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "load"),
        ("dtype", "int64"),
        ("dtype", None),
        ("example", [2**40, 96]),
        ("example", [9]),
        ("sizes", ["d0", 97]),
        ("sizes", [9, 96]),
        ("value", 3),
        ("name", "y"),
    ],
)
def test_inputs_agree_with_the_graph_and_the_facts(bundle, field, value):
    edit_json(bundle, "manifest.json", lambda data: data["inputs"][0].update({field: value}))
    refused(bundle, "graph.json|manifest.json|differ from the manifest")


def test_a_changed_bundle_whose_hashes_fit_does_not_verify(bundle):
    """Below the tolerance of the fingerprint too: the seal is the manifest's own."""

    def edit(tensors):
        tensors["head.weight"][0, 0] += 1e-3

    edit_tensors(bundle, edit, seal=False)
    assert fxq.load(bundle) is not None
    verdict = verify_bundle(bundle)
    assert not verdict.ok
    assert {c.name for c in verdict.checks if c.status == "failed"} == {"the manifest is the one that was saved"}


@pytest.mark.parametrize("removed", ["seal", "fingerprint"])
def test_taking_the_seal_or_the_fingerprint_away_is_noticed(bundle, removed):
    edit_json(bundle, "manifest.json", lambda data: data.pop(removed) and None, seal=False)
    assert not verify_bundle(bundle).ok


def test_an_axis_that_is_computed_is_refused():
    x = torch.fx.Graph().placeholder("x")
    from fxq.export.graph.arguments import NUMBER, TENSOR, ArgumentError, check_call

    n = x.graph.placeholder("n")
    with pytest.raises(ArgumentError, match=r"dim0 is n, expected a number"):
        check_call(torch.ops.aten.transpose.int, (x, n, 1), {}, {x: TENSOR, n: NUMBER})


def test_a_plan_whose_layer_is_no_name_is_refused():
    from fxq.core.ir import LayerPlan

    with pytest.raises(TypeError, match="the layer of a plan is dict, expected a name"):
        LayerPlan.from_json({"layer": {}, "scheme": None, "outliers": []})
