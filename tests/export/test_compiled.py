"""Calls of compiled programs are checked before machine code reads their memory."""

import json

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import fxq
from fxq.calls.rules import InputError
from fxq.export.capture import ExportError
from fxq.export.compiled import KEY, call_facts, compiled_program
from fxq.passes.methods.ranges import MinMax

RECIPE = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),), weighting="uniform")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 32)

    def forward(self, x, caches, *, flag=True):
        y = self.fc(x) if x.shape[0] % 2 == 0 else x
        caches["k"].add_(1)
        return y * (2 if flag else 1) + caches["v"]


class Package:
    """Stands for what torch loads: runs a module, and notes the memory that it is given."""

    def __init__(self, module, spec):
        self.module, self.loader = module, self
        self.get_call_spec = lambda: (pytree.treespec_dumps(spec), "")
        self.given = []

    def __call__(self, *args, **kwargs):
        self.given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return self.module(*args, **kwargs)


def example(batch=4, **changed):
    call = {"x": torch.randn(batch, 32), "caches": {"k": torch.zeros(3, 5), "v": torch.randn(32)}, "flag": True}
    return call | changed


@pytest.fixture(scope="module")
def case():
    shapes = {"x": {0: Dim.AUTO}, "caches": {"k": None, "v": None}, "flag": None}
    q = fxq.quantize(Model().eval(), [example()], RECIPE, dynamic_shapes=shapes, progress=False)
    package = Package(q, q.graph._codegen.pytree_info.in_spec)
    facts = json.loads(json.dumps({KEY: call_facts(q)}))
    return q, package, facts


def test_facts_say_what_is_written_and_where_inputs_lie(case):
    stated = case[2][KEY]
    assert stated["arguments"] == ["x", "caches", "flag"]
    assert [stated["names"][i] for i in stated["written"]] == ["caches_k"]
    assert stated["devices"] == ["cpu", "cpu", "cpu", None]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(4, 16)}, r"input x has shape \[4, 16\], the graph was captured for \[any, 32\]"),
        ({"x": torch.randn(32)}, r"input x has shape \[32\]"),
        ({"x": torch.randn(4, 32).double()}, "input x is float64, the graph was captured for float32"),
        ({"x": torch.ones(4, 32, dtype=torch.int64)}, "input x is int64"),
        ({"x": torch.randn(3, 32)}, r"captured for \(x\.shape\[0\] % 2\) == 0"),
        ({"x": torch.randn(4, 32, device="meta")}, "input x is on meta, the program was compiled for cpu"),
        ({"x": None}, "input x is None"),
        ({"flag": False}, "input flag is False, the graph was captured for True"),
        ({"flag": torch.tensor(True)}, "input flag is a tensor"),
        ({"caches": {"k": torch.zeros(3, 5)}}, "nested in another way"),
        ({"caches": [torch.zeros(3, 5), torch.zeros(32)]}, "nested in another way"),
        ({"more": 1}, r"unknown \['more'\]"),
    ],
)
def test_a_call_that_does_not_fit_never_reaches_the_code(case, changed, message):
    _, package, facts = case
    run, package.given = compiled_program(package, facts, "folder"), []
    with pytest.raises(InputError, match=message):
        run(**example(**changed))
    assert not package.given


def test_strided_inputs_are_made_dense_and_written_back(case):
    q, package, facts = case
    run = compiled_program(package, facts, "folder")
    call = example(6)
    call["x"] = torch.randn(32, 6).t()
    call["caches"] = {"v": torch.randn(64)[::2], "k": torch.zeros(5, 3).t()}
    assert not any(t.is_contiguous() for t in (call["x"], *call["caches"].values()))
    got = run(call["x"], call["caches"], flag=True)
    assert all(tensor.is_contiguous() for tensor in package.given)
    assert torch.equal(call["caches"]["k"], torch.ones(3, 5)), "the caller's cache is written"
    assert torch.equal(got, q(**call))


def test_dense_inputs_are_not_copied(case):
    _, package, facts = case
    call = example()
    compiled_program(package, facts, "folder")(**call)
    assert [t.data_ptr() for t in package.given] == [
        t.data_ptr() for t in (call["x"], call["caches"]["k"], call["caches"]["v"])
    ]
    assert torch.equal(call["caches"]["k"], torch.ones(3, 5))


def test_views_that_are_negative_are_resolved(case):
    q, package, facts = case
    call = example()
    call["x"] = torch.complex(torch.randn(4, 32), torch.randn(4, 32)).conj().imag
    assert call["x"].is_neg()
    got = compiled_program(package, facts, "folder")(**call)
    assert not any(t.is_neg() for t in package.given)
    assert torch.equal(got, q(**call))


@pytest.mark.parametrize(
    "damage",
    [
        {"names": ["x"]},
        {"names": "xyzw"},
        {"names": ["x", "a b", "c", "d"]},
        {"arguments": ["x"]},
        {"arguments": [1, 2, 3]},
        {"devices": ["cpu"]},
        {"devices": [1, 2, 3, 4]},
        {"written": [9]},
        {"written": [-1]},
        {"written": [3]},
        {"written": "0"},
        {"inputs": []},
        {"dtypes": [None, None, None, "load"]},
        {"conditions": [["==", ["size", 0, 7], 1]]},
        {"conditions": None},
    ],
    ids=str,
)
def test_damaged_statements_are_refused(case, damage):
    _, package, facts = case
    with pytest.raises(ExportError, match="folder: what it states of its calls is damaged"):
        compiled_program(package, {KEY: facts[KEY] | damage}, "folder")


@pytest.mark.parametrize("stated", [[], "x", 3, {"names": []}])
def test_a_statement_of_another_kind_is_refused(case, stated):
    with pytest.raises(ExportError, match="damaged"):
        compiled_program(case[1], {KEY: stated}, "folder")


def test_a_program_of_an_older_version_runs_with_a_warning(case):
    q, package, _ = case
    with pytest.warns(UserWarning, match="folder was exported before programs stated their inputs"):
        run = compiled_program(package, {}, "folder")
    call = example()
    assert torch.equal(run(call["x"], call["caches"], call["flag"]), q(**call))
    with pytest.raises(InputError, match="nested in another way"):
        run(call["x"], call["caches"]["k"], call["flag"])
