"""A quantized module refuses what it was not captured for however it is copied, carried, wrapped or compiled."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxq
from fxq.calls.captured import CapturedModule, rules_of
from fxq.calls.rules import InputError
from fxq.core.facts import Facts
from fxq.passes.methods.ranges import MinMax
from tests.toys import recipe, rows, toy

PLAIN = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),))


class Tokens(nn.Module):
    """Its result depends on a size, which a graph may have as a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 64)

    def forward(self, x, *, extra):
        y = self.fc(x) * x.shape[1] + extra["b"]
        return {"y": y - extra["a"][0] if x.shape[0] % 2 == 0 else y}


def call(batch, tokens=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, tokens, 64, generator=g).to(dtype)
    return (x,), {"extra": {"b": torch.ones(64), "a": [torch.zeros(64)]}}


@pytest.fixture(scope="module")
def model():
    return Tokens().eval()


def quantized(model):
    (x,), options = call(4)
    batch = {"x": x} | options
    shapes = {"x": {0: Dim.AUTO}, "extra": {"b": None, "a": [None]}}
    return fxq.quantize(model, [batch], PLAIN, dynamic_shapes=shapes, progress=False)


@pytest.fixture(scope="module", params=["quantize", "load", "optimize"])
def module(request, model, tmp_path_factory):
    q = quantized(model)
    if request.param == "load":
        return fxq.load(fxq.save(q, tmp_path_factory.mktemp("captured") / "b"))
    return fxq.optimize(q) if request.param == "optimize" else q


def saved_by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "the module": lambda m: m,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle of a deepcopy": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(m))),
    "torch.save": saved_by_torch,
    "GraphModule of its graph": lambda m: torch.fx.GraphModule(m, m.graph),
    "forward": lambda m: m.forward,
    "moved": lambda m: copy.deepcopy(m).to("cpu").eval().requires_grad_(False),
    "trained and evaluated": lambda m: copy.deepcopy(m).train().eval(),
    "child": lambda m: nn.ModuleList([copy.deepcopy(m)])[0],
    "replica": lambda m: m._replicate_for_data_parallel(),
}


def recompiled(module):
    again = copy.deepcopy(module)
    again.recompile()
    return again


COPIES["recompiled"] = recompiled


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_every_copy_computes_the_same_and_refuses_the_same(module, make):
    args, options = call(6)
    want, copied = module(*args, **options)["y"], make(module)
    assert torch.equal(copied(*args, **options)["y"], want)
    swapped = {"extra": dict(reversed(list(options["extra"].items())))}
    assert torch.equal(copied(*args, **swapped)["y"], want)
    for (x,), _ in (call(3), call(4, 5), call(4, dtype=torch.float64)):
        with pytest.raises(InputError):
            copied(x, **options)
    with pytest.raises(InputError, match="nested in another way"):
        copied(*args, extra=options["extra"] | {"a": [torch.zeros(64)] * 2})


@pytest.mark.parametrize("make", ["the module", "copy", "deepcopy", "pickle", "torch.save"])
def test_copies_keep_facts_plans_and_tensors(module, make):
    copied = COPIES[make](module)
    assert isinstance(copied, CapturedModule)
    assert Facts.of(copied) == Facts.of(module)
    assert fxq.summary(copied).rows == fxq.summary(module).rows
    assert rules_of(copied).to_json() == rules_of(module).to_json()
    assert {n: t.shape for n, t in copied.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}
    args, options = call(2)
    with pytest.raises(InputError, match=r"missing \['extra'\]"):
        copied(*args)
    with pytest.raises(InputError, match=r"unknown \['more'\]"):
        copied(*args, **options, more=1)


def test_an_unpickled_module_can_be_optimized_and_saved(model, tmp_path):
    q = quantized(model)
    again = pickle.loads(pickle.dumps(q))
    args, options = call(4)
    assert fxq.summary(fxq.optimize(again)).rows == fxq.summary(fxq.optimize(q)).rows
    fxq.save(again, tmp_path / "again")
    fxq.save(q, tmp_path / "first")
    for name in ("graph.json", "model.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert torch.equal(fxq.load(tmp_path / "again")(*args, **options)["y"], q(*args, **options)["y"])


def test_a_module_with_hooks_is_not_pickled_without_them(model):
    q = quantized(model)
    q.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"forward hooks, which cannot be pickled: remove them, or use fxq\.save"):
        pickle.dumps(q)


def in_another_process(module, x, results):
    try:
        module(x[:, :-1])
        refused = ""
    except ValueError as error:
        refused = str(error)
    results.put((module(x).detach().numpy(), refused))


@pytest.mark.slow
def test_a_spawned_process_gets_the_module_as_it_is():
    q = fxq.quantize(toy(), [rows(9, 96)], recipe(8), progress=False)
    context, x = multiprocessing.get_context("spawn"), rows(5, 96)
    results = context.Queue()
    process = context.Process(target=in_another_process, args=(q, x, results))
    process.start()
    try:
        got, refused = results.get(timeout=180)
    finally:
        process.join(60)
    assert torch.equal(torch.from_numpy(got), q(x).detach())
    assert "input x has shape [5, 95], the graph was captured for [any, 96]" in refused


def test_a_compiled_module_is_right_at_every_batch_and_refuses_the_same(module):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend)
    with torch.no_grad():
        for batch in (4, 6, 8, 2, 10):
            args, options = call(batch)
            assert torch.equal(compiled(*args, **options)["y"], module(*args, **options)["y"])
        made = len(graphs)
        assert made <= 3, "one for the first size, one for any, one for small ones"
        for (x,), options in (call(3), call(4, 5), call(4, dtype=torch.float64)):
            with pytest.raises(InputError):
                compiled(x, **options)
        assert len(graphs) == made


def test_a_compiled_module_has_no_graph_break(module):
    torch._dynamo.reset()
    args, options = call(4)
    with torch.no_grad():
        whole = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
        assert torch.equal(whole(*args, **options)["y"], module(*args, **options)["y"])
    explained = torch._dynamo.explain(module)(*args, **options)
    assert explained.graph_break_count == 0


@pytest.mark.sweep
def test_inductor_compiles_a_quantized_module(module):
    torch._dynamo.reset()
    compiled = torch.compile(module)
    with torch.no_grad():
        for batch in (4, 6, 8):
            args, options = call(batch)
            got, want = compiled(*args, **options)["y"], module(*args, **options)["y"]
            assert torch.allclose(got, want, atol=1e-3)
        with pytest.raises(InputError):
            compiled(call(3)[0][0], **options)


class Even(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x) * 2 if x.shape[0] % 2 == 0 else self.fc(x)


def test_an_export_of_the_module_keeps_its_conditions():
    q = fxq.quantize(Even().eval(), [torch.randn(4, 64)], PLAIN, progress=False)
    program = torch.export.export(q, (torch.randn(4, 64),), dynamic_shapes=({0: Dim.AUTO},))
    again = program.module()
    assert again(torch.randn(6, 64)).shape == (6, 64)
    with pytest.raises(AssertionError, match="Guard failed"):
        again(torch.randn(3, 64))


CODE = """
import pickle, sys, torch
module = pickle.load(open(sys.argv[1], "rb"))
print(tuple(module(torch.ones(3, 96)).shape), type(module).__mro__[1].__name__)
"""


@pytest.mark.sweep
def test_a_pickle_needs_no_import_of_fxq_before_it_is_read(tmp_path):
    q = fxq.quantize(toy(), [rows(9, 96)], recipe(8), progress=False)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(q))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "m.pkl")], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[0].endswith("CapturedModule"), done.stderr
