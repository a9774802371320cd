"""Attacks 1 and 2: a bundle whose calling convention or operators run code, read files or eat the machine."""

import itertools
import json

import pytest
import torch

import fxq
from fxq.export.graph import operators
from fxq.export.graph.graph_json import GraphFormatError, check_writable
from tests.attacks.corpus import edit_json, first
from tests.attacks.mutants import OPERATORS

ENUM = r'{"\u005f_enum__": true, "fqn": "tests.attacks.planted:Planted", "name": "x"}'


@pytest.mark.parametrize(
    "context",
    [
        ENUM,
        ENUM.replace(r"\u005f_", "__"),
        json.dumps({"default_factory_module": "os", "default_factory_name": "system", "dict_context": []}),
        json.dumps([json.loads(ENUM)]),
        "[" * 500,
        '["a"]',
    ],
)
@pytest.mark.parametrize("spec", ["in_spec", "out_spec"])
def test_no_context_of_a_calling_convention_imports_a_module(bundle, monkeypatch, context, spec):
    imported = []
    monkeypatch.setattr("importlib.import_module", lambda name, *rest: imported.append(name))
    edit_json(bundle, "graph.json", lambda data: data[spec][1].update(context=context))
    with pytest.raises(fxq.BundleError, match="calling convention"):
        fxq.load(bundle)
    assert not imported


@pytest.mark.parametrize("kind", ["collections.defaultdict", "collections.deque", "torch.Size", "builtins.slice", "os"])
def test_a_structure_is_of_an_allowed_type_or_refused(bundle, kind):
    edit_json(bundle, "graph.json", lambda data: data["in_spec"][1]["children_spec"][0].update(type=kind))
    with pytest.raises(fxq.BundleError, match="calling convention"):
        fxq.load(bundle)


FORBIDDEN = [name for name in OPERATORS if name.startswith("aten.") and name not in operators.ALLOWED]


def test_operators_with_effects_are_not_on_the_list():
    assert len(FORBIDDEN) > 1000
    packets = {name.split(".")[1] for name in operators.ALLOWED}
    for word in ("from_file", "save", "print", "resize", "set_", "rand", "_cuda", "string", "dict", "as_strided"):
        assert not [packet for packet in packets if word in packet]
    assert not [name for name in operators.ALLOWED if name.endswith((".out", "_out"))]


@pytest.mark.parametrize("name", sorted(operators.ATEN))
def test_an_allowed_operator_is_what_the_list_says(name):
    found = operators.find(name)
    assert found is not None, "torch has no such overload"
    written = [a.name for a in found._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ([found._schema.arguments[0].name] if name in operators.IN_PLACE else [])
    kinds = {str(argument.real_type) for argument in found._schema.arguments}
    assert not [k for k in kinds if any(w in k for w in ("Any", "Generator", "Storage", "Stream", "Dimname"))]
    assert {str(result.real_type) for result in found._schema.returns} <= {"Tensor", "List[Tensor]", "int", "number"}


@pytest.mark.parametrize(
    "name", ["aten.from_file.out", "aten.from_file.default", "aten.save.default", *FORBIDDEN[::97]]
)
def test_a_graph_that_calls_another_operator_is_refused(bundle, name, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\1" * 64)

    def edit(data):
        node = first(data, "gelu")
        node.update(target=name, args=[str(secret), False, 64], kwargs={"out": {"node": node["args"][0]["node"]}})

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match=r"is not allowed in a bundle|does not exist"):
        fxq.load(bundle)
    assert secret.read_bytes() == b"\1" * 64


ARITHMETIC = {
    "a power without end": ("operator.pow", [7, 10**8], "constant exponent"),
    "a text a billion times": ("operator.mul", ["a", 10**9], "takes numbers"),
    "a list a billion times": ("operator.mul", [{"list": [1]}, 10**9], "takes numbers"),
    "an item of a text": ("operator.getitem", ["abc", 1], "takes 2 numbers"),
    "too few": ("operator.add", [1], "takes 2 numbers"),
    "a shift": ("operator.lshift", [1, 10**9], "not allowed"),
    "an attribute": ("operator.attrgetter", ["__class__"], "not allowed"),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_numbers_cannot_grow_while_a_bundle_is_read(bundle, case):
    target, args, message = ARITHMETIC[case]
    extra = {"name": "grown", "op": "call_function", "target": target, "args": args, "kwargs": {}}
    edit_json(bundle, "graph.json", lambda data: data["nodes"].insert(3, extra))
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)


def test_products_of_products_of_sizes_are_bounded(bundle):
    def edit(data):
        position = data["nodes"].index(first(data, "quantize_act"))
        x = next(node["name"] for node in data["nodes"] if node["op"] == "placeholder")
        size = {"name": "n0", "op": "call_function", "target": "aten.sym_size.int", "args": [{"node": x}, 0]}
        made = [size | {"kwargs": {}}]
        for i in range(40):
            args = [{"node": f"n{i}"}] * 2
            made.append(
                {"name": f"n{i + 1}", "op": "call_function", "target": "operator.mul", "args": args, "kwargs": {}}
            )
        data["nodes"][position:position] = made

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match="could give a number of 4032 bits"):
        fxq.load(bundle)


BOMBS = {
    "full": ("aten.full.default", [{"list": [2**34]}, 1.0], {}),
    "arange": ("aten.arange.default", [2**34], {}),
    "eye": ("aten.eye.default", [2**20], {}),
    "repeat": ("aten.repeat.default", [{"node": "gelu"}, {"list": [2**30, 1]}], {}),
    "pad": ("aten.constant_pad_nd.default", [{"node": "gelu"}, {"list": [0, 2**36]}], {}),
    "outer": ("aten.kron.default", [{"node": "head_weight"}] * 2, {}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_graph_that_makes_far_more_than_it_was_given_is_refused(bundle, case):
    target, args, kwargs = BOMBS[case]

    def edit(data):
        position = next(i for i, node in enumerate(data["nodes"]) if node["name"] == "gelu") + 1
        reads = [node for node in data["nodes"] if node["op"] == "get_attr"]
        data["nodes"] = [*reads, *(n for n in data["nodes"] if n not in reads)]
        position = next(i for i, node in enumerate(data["nodes"]) if node["name"] == "gelu") + 1
        made = [{"name": "bomb", "op": "call_function", "target": target, "args": args, "kwargs": kwargs}]
        for i in range(3 if case == "outer" else 0):
            last = {"node": "bomb" if i == 0 else f"bomb{i}"}
            made.append(made[0] | {"name": f"bomb{i + 1}", "args": [last, last]})
        data["nodes"][position:position] = made

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match=r"would make \d+ bytes|does not fit its arguments"):
        fxq.load(bundle)


def test_twenty_doublings_of_a_tensor_are_refused(bundle):
    def edit(data):
        position = next(i for i, node in enumerate(data["nodes"]) if node["name"] == "gelu") + 1
        names = ["gelu", *(f"twice{i}" for i in range(40))]
        data["nodes"][position:position] = [
            {
                "name": new,
                "op": "call_function",
                "target": "aten.cat.default",
                "args": [{"list": [{"node": old}] * 2}],
                "kwargs": {},
            }
            for old, new in itertools.pairwise(names)
        ]

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match=r"twice\d+: aten.cat.default would make \d+ bytes"):
        fxq.load(bundle)


ARGUMENTS = {
    "a dtype code": (
        "gelu",
        {"target": "aten.to.dtype", "args": [{"node": "x"}, 97]},
        "dtype is 97, expected ScalarType",
    ),
    "an unknown dtype": (
        "gelu",
        {"target": "aten.to.dtype", "args": [{"node": "x"}, {"dtype": "quint8"}]},
        "malformed",
    ),
    "a sparse layout": ("gelu", {"kwargs": {"approximate": {"layout": "sparse_coo"}}}, "malformed argument"),
    "an unknown text": ("gelu", {"kwargs": {"approximate": "x" * 9}}, "approximate is 'xxxxxxxxx'"),
    "an unknown keyword": ("gelu", {"kwargs": {"out": {"node": "x"}}}, "has no argument 'out'"),
    "too many": ("gelu", {"args": [{"node": "x"}, 1, 2, 3]}, "takes 1 positional arguments, not 4"),
    "random numbers": (
        "gelu",
        {"target": "aten.dropout.default", "args": [{"node": "x"}, 0.5, True]},
        r"train is True, a bundle may only have \(False,\)",
    ),
    "pinned memory": (
        "gelu",
        {"target": "aten.empty_like.default", "args": [{"node": "x"}], "kwargs": {"pin_memory": True}},
        "pin_memory is True",
    ),
    "a huge whole number": (
        "gelu",
        {"target": "aten.select.int", "args": [{"node": "x"}, 2**63, 0]},
        "more than 64 bits",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_are_those_of_the_schema(bundle, case):
    name, changes, message = ARGUMENTS[case]
    edit_json(bundle, "graph.json", lambda data: first(data, name).update(changes))
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)


def test_a_stored_tensor_that_kernels_index_with_cannot_be_written_by_the_graph(bundle):
    def edit(data):
        position = data["nodes"].index(first(data, "quantize_act"))
        perm = next(node["name"] for node in data["nodes"] if node["target"] == "blocks.0.up.perm")
        write = {"name": "bad", "op": "call_function", "target": "aten.fill_.Scalar", "args": [{"node": perm}, 5000]}
        data["nodes"].insert(position, write | {"kwargs": {}})

    edit_json(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match="it is read by more than its layer"):
        fxq.load(bundle)


def test_what_could_not_be_loaded_is_found_before_it_is_saved(bundle):
    module = fxq.load(bundle)
    check_writable(module)
    node = module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)[0]
    node.target = torch.ops.aten.rrelu.default
    with pytest.raises(GraphFormatError, match=r"node gelu: aten.rrelu.default is neither"):
        check_writable(module)
