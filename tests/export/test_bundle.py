import copy
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxq
from fxq.export.bundle import FORMAT_VERSION, read_manifest, seal_of
from tests.calibration.test_calibrate import Keywords
from tests.toys import recipe, rows, toy, wan_rollout

X = rows(9, 96)
FILES = ["graph.json", "manifest.json", "model.safetensors"]


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [X], recipe(4))


@pytest.fixture(scope="module")
def original(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "original")


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def resign(folder):
    """Make the manifest's hashes fit, as an attacker would."""
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    for name in data["files"]:
        data["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    data["seal"] = seal_of(data)
    file.write_text(json.dumps(data))


def change(folder, name, edit):
    data = json.loads((folder / name).read_text())
    data = edit(data) or data
    if name == "manifest.json" and isinstance(data, dict):
        data["seal"] = seal_of(data)
    (folder / name).write_text(json.dumps(data))
    if name != "manifest.json":
        resign(folder)


def assert_round_trip(model, data, path, chosen=None, **kwargs):
    q = fxq.quantize(model.eval(), data, chosen or recipe(4))
    loaded = fxq.load(fxq.save(q, path))
    batch = fxq.calibration.calibrate.as_batch(data[0])
    want, got = q(*batch.args, **batch.kwargs), loaded(*batch.args, **batch.kwargs)
    flat = torch.utils._pytree.tree_flatten
    assert flat(want)[1] == flat(got)[1]
    for a, b in zip(flat(want)[0], flat(got)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert fxq.summary(loaded).to_json() == fxq.summary(q).to_json()
    again = fxq.load(fxq.save(loaded, path))
    assert again.state_dict().keys() == q.state_dict().keys()
    assert all(torch.equal(t, q.state_dict()[name]) for name, t in again.state_dict().items())
    return loaded


class Structured(nn.Module):
    """Nested output, a buffer, a constant and a size-dependent view."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32, bias=False)
        self.register_buffer("shift", torch.arange(32.0).bfloat16())

    def forward(self, x):
        y = self.linear(x).view(x.shape[0], -1) + self.shift * float("inf") * 0 + torch.tensor([1.5])
        return {"y": y[:, 1:-1:2], "more": (y.to(torch.float64), [y.amax(), None])}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_loaded_bundle_computes_the_same_bits(tmp_path, bits, dtype, bias):
    assert_round_trip(toy(bias=bias).to(dtype), [X.to(dtype)], tmp_path / "b", recipe(bits))


def test_structures_survive(tmp_path):
    inputs = {"a": rows(3, 64), "b": rows(3, 48)}
    assert_round_trip(Keywords(), [fxq.Batch((inputs,), {"gain": torch.ones(1)})], tmp_path / "keywords", recipe(8))
    loaded = assert_round_trip(Structured(), [rows(2, 64)], tmp_path / "nested", recipe(8))
    out = loaded(rows(2, 64))
    assert list(out) == ["y", "more"] and out["more"][1][1] is None


def test_a_denoiser_with_dynamic_sizes_survives(tmp_path):
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, recipe(4))
    loaded = fxq.load(fxq.save(q, tmp_path / "wan"))
    other = wan_rollout((5,), 4)
    latents = []
    for module in (q, loaded):
        with other.using(module):
            latents.append(other.rollout(*other.batches[0]))
    assert torch.equal(*latents)


def test_a_fresh_process_computes_the_same_bits(bundle, quantized, tmp_path):
    save_file({"x": X}, tmp_path / "x.safetensors")
    program = (
        "import sys, fxq\nfrom safetensors.torch import load_file, save_file\n"
        "x = load_file(sys.argv[2])['x']\nsave_file({'y': fxq.load(sys.argv[1])(x)}, sys.argv[3])\n"
        "assert 'tests' not in sys.modules\n"
    )
    files = [str(bundle), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(files[2])["y"], quantized(X))


def test_a_bundle_is_three_files_that_state_their_content(original, quantized):
    assert sorted(file.name for file in original.iterdir()) == FILES
    manifest = read_manifest(original)
    assert manifest.format_version == FORMAT_VERSION == 1 and manifest.fxq_version == fxq.__version__
    assert manifest.facts == fxq.summary(quantized).facts
    assert manifest.layers["blocks.0.up"].tensors == tuple(
        f"blocks.0.up.{n}" for n in ("input_scale", "input_zero_point", "offset", "perm", "weight", "weight_scale")
    )
    forms = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    assert forms == {
        "blocks.0.up.input_scale": ("float32", (2,)),
        "blocks.0.up.input_zero_point": ("int32", (2,)),
        "blocks.0.up.offset": ("float32", (64,)),
        "blocks.0.up.perm": ("int32", (96,)),
        "blocks.0.up.weight": ("uint8", (64, 48)),
        "blocks.0.up.weight_scale": ("float32", (2, 64)),
        "blocks.0.down.input_scale": ("float32", (1,)),
        "blocks.0.down.input_zero_point": ("int32", (1,)),
        "blocks.0.down.offset": ("float32", (96,)),
        "blocks.0.down.weight": ("uint8", (96, 32)),
        "blocks.0.down.weight_scale": ("float32", (1, 96)),
        "head.weight": ("float32", (7, 96)),
        "head.bias": ("float32", (7,)),
    }


def test_the_same_model_gives_the_same_bytes(quantized, original, tmp_path):
    again = fxq.save(fxq.quantize(toy(), [X], recipe(4)), tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (original / name).read_bytes()


def drop(key):
    return lambda data: data.pop(key) and None


def first(op):
    return lambda data: next(node for node in data["nodes"] if node["op"] == op)


def put(kind, /, **values):
    return lambda data: first(kind)(data).update(values)


MANIFEST_FAULTS = {
    "version": (lambda d: d.update(format_version=2), r"format version 2, this fxq reads 1; load it .* \(0\."),
    "no version": (drop("format_version"), "format version None"),
    "version text": (lambda d: d.update(format_version="1"), "format version '1'"),
    "no layers": (drop("layers"), "layers: .*the bundle is damaged"),
    "other file": (lambda d: d["files"].update({"../x": "0"}), r"lists files \['../x'"),
    "tensor": (lambda d: d["tensors"]["head.bias"].update(shape=[8]), "tensors differ from the manifest: head.bias"),
    "tensor more": (lambda d: d["tensors"].update(ghost={"dtype": "int8", "shape": []}), "the manifest: ghost"),
    "dtype": (lambda d: d["tensors"]["head.bias"].update(dtype="int8"), "tensors differ from the manifest: head.bias"),
    "plan": (lambda d: d["layers"]["head"]["plan"].update(reason="x"), "plans on the graph differ"),
    "layer gone": (lambda d: d["layers"].pop("head") and None, "plans on the graph differ"),
    "list": (lambda d: [d], "format version None"),
}


@pytest.mark.parametrize("case", MANIFEST_FAULTS)
def test_a_manifest_that_is_not_this_bundles_is_refused(bundle, case):
    edit, message = MANIFEST_FAULTS[case]
    change(bundle, "manifest.json", edit)
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)


EVIL = "__import__('pathlib').Path('pwned').touch()"
GRAPH_FAULTS = {
    "operator": (put("call_function", target="os.system"), "operator 'os.system' is not allowed in a bundle"),
    "file": (put("call_function", target="aten.from_file.default"), "is not allowed in a bundle"),
    "namespace": (put("call_function", target="mylib.op.default"), "is not allowed in a bundle"),
    "unknown": (put("call_function", target="aten.nonsense.default"), "does not exist in torch"),
    "attribute": (put("call_function", target="aten.add.__class__"), "does not exist in torch"),
    "method": (put("call_function", target="aten.__dict__.clear"), "does not exist in torch"),
    "packet": (put("call_function", target="aten.add"), "does not exist in torch"),
    "op kind": (put("call_function", op="call_module"), "unknown kind 'call_module'"),
    "placeholder": (put("placeholder", target=f"x={EVIL}"), "is not an identifier"),
    "keyword": (put("placeholder", target="lambda"), "'lambda' is not an identifier"),
    "argument": (lambda d: d.update(arguments=[f"x={EVIL}"]), "is not an identifier"),
    "kwarg": (put("call_function", kwargs={f"a=1, **{EVIL}, b": 1}), "is not an identifier"),
    "tensor name": (put("get_attr", target=f'a"), {EVIL}, getattr(self, "b'), "is not a tensor's name"),
    "name": (put("call_function", name=7), "7 is not a name"),
    "defaultdict": (
        lambda d: d["out_spec"].__setitem__(1, {"type": "collections.defaultdict", "context": {}, "children_spec": []}),
        "defaultdict or an enum",
    ),
    "enum": (
        lambda d: d["in_spec"][1].update(context='{"__enum__": true, "fqn": "os:x", "name": "y"}'),
        "defaultdict or an enum",
    ),
    "type": (lambda d: d["out_spec"][1].update(type="my.Output"), "Import the package that registers the type"),
    "spec": (lambda d: d.update(in_spec=[1]), "malformed"),
    "spec kwargs": (
        lambda d: d["in_spec"][1]["children_spec"][1].update(
            context=json.dumps([f"k': {EVIL}, 'z"]),
            children_spec=[{"type": None, "context": None, "children_spec": []}],
        ),
        "is not an identifier",
    ),
    "absent tensor": (put("get_attr", target="head.gone"), "tensor 'head.gone' is not in the bundle"),
    "later node": (put("call_function", args=[{"node": "output"}]), "malformed argument {'node': 'output'}"),
    "bare list": (put("call_function", args=[[1]]), "a bare JSON list is not an argument"),
    "two keys": (put("call_function", args=[{"node": "x", "list": []}]), "malformed argument"),
    "dtype": (put("call_function", args=[{"dtype": "load"}]), "malformed argument"),
    "float": (put("call_function", args=[{"float": "1e5"}]), "malformed argument"),
    "slice": (put("call_function", args=[{"slice": [1]}]), "malformed argument"),
    "no nodes": (drop("nodes"), "malformed graph: KeyError"),
    "nodes": (lambda d: d.update(nodes=5), "malformed graph: TypeError"),
    "graph": (lambda d: [d], "malformed graph: TypeError"),
    "entry": (lambda d: d["nodes"].insert(0, "text"), "malformed graph: TypeError"),
    "twice": (lambda d: d["nodes"].insert(0, d["nodes"][0]), "the name is used twice"),
    "no args": (lambda d: first("call_function")(d).pop("args") and None, "malformed graph: KeyError"),
    "plan field": (lambda d: d["nodes"][-2]["plan"].update(color=1), "malformed graph: TypeError"),
    "plan bits": (
        lambda d: next(n for n in d["nodes"] if "dual" in n["target"])["plan"]["scheme"].update(weight_bits=3),
        "weight_bits = 3: expected 4..8",
    ),
    "split": (
        lambda d: next(n for n in d["nodes"] if "dual" in n["target"])["args"].__setitem__(5, 32),
        "blocks.0.up: split 32, the plan says 64",
    ),
    "few args": (
        lambda d: next(n for n in d["nodes"] if "dual" in n["target"])["args"].pop() and None,
        "dual_scale_linear.default needs the argument 'dtype'",
    ),
    "no plan": (lambda d: d["nodes"][-2].pop("plan") and None, "every linear is decided: head: no plan"),
}


@pytest.mark.parametrize("case", GRAPH_FAULTS)
def test_a_malicious_or_malformed_graph_is_refused(bundle, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit, message = GRAPH_FAULTS[case]
    change(bundle, "graph.json", edit)
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(fxq.BundleError, match=f"{name}.*(is missing|No such file)"):
        fxq.load(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_file_is_refused(bundle, name, keep):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:keep])
    with pytest.raises(fxq.BundleError, match=f"{name}.*(truncated or altered|not valid JSON)"):
        fxq.load(bundle)


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
def test_one_flipped_bit_is_noticed(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[-3] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(fxq.BundleError, match=f"{name} does not have the hash"):
        fxq.load(bundle)


def test_tensors_that_are_no_safetensors_are_refused(bundle):
    (bundle / "model.safetensors").write_bytes(b"\xff" * 64)
    resign(bundle)
    with pytest.raises(fxq.BundleError, match=r"model.safetensors cannot be read"):
        fxq.load(bundle)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.0.up.offset", torch.full((64,), torch.nan), "a scale or offset is not finite"),
        ("blocks.0.up.weight", torch.zeros(64, 47, dtype=torch.uint8), r"weight \(64, 47\), expected \(64, 48\)"),
        ("blocks.0.up.weight", torch.zeros(64, 48, dtype=torch.int8), "weight dtype torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_their_plan_are_refused(bundle, name, tensor, message):
    tensors = load_file(bundle / "model.safetensors")
    tensors[name] = tensor
    save_file(tensors, bundle / "model.safetensors")
    entry = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    resign(bundle)
    change(bundle, "manifest.json", lambda d: d["tensors"].update({name: entry}))
    with pytest.raises(fxq.BundleError, match=message):
        fxq.load(bundle)


def test_a_path_without_a_bundle_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            fxq.BundleError, match=r"manifest.json: No such file.*; a bundle is a folder made by fxq.save"
        ):
            fxq.load(path)


def test_devices_in_a_graph_give_way_to_the_one_asked_for(bundle):
    def elsewhere(data):
        node = first("call_function")(data)
        extra = {"name": "z", "op": "call_function", "target": "aten.zeros.default", "args": [{"list": [1]}]}
        extra["kwargs"] = {"device": {"device": "cuda:3"}}
        data["nodes"].insert(data["nodes"].index(node), extra)

    change(bundle, "graph.json", elsewhere)
    (zeros,) = fxq.load(bundle).graph.find_nodes(op="call_function", target=torch.ops.aten.zeros.default)
    assert zeros.kwargs["device"] == torch.device("cpu")


@pytest.mark.parametrize("module", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2))])
def test_only_quantized_modules_are_saved(module, tmp_path):
    with pytest.raises(fxq.BundleError, match="it carries no fxq facts"):
        fxq.save(module, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_module_that_breaks_a_rule_is_not_saved(quantized, tmp_path):
    broken = copy.deepcopy(quantized)
    del broken.get_submodule("blocks.0.up").offset
    with pytest.raises(fxq.BundleError, match=r"before save: .*blocks.0.up: a tensor is missing"):
        fxq.save(broken, tmp_path / "b")


@torch.library.custom_op("fxq_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@triple.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_of_another_library_is_loaded_at_the_callers_word_only(tmp_path):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return triple(self.linear(x))

    q = fxq.quantize(Custom().eval(), [rows(3, 64)], recipe())
    fxq.save(q, tmp_path / "b")
    for allowed in ((), ("fxq_tests.double",), ("fxq_tests",)):
        with pytest.raises(
            fxq.BundleError, match=r"fxq_tests\.triple\.default.*pass operators=\['fxq_tests\.triple'\]"
        ):
            fxq.load(tmp_path / "b", operators=allowed)
    x = rows(3, 64)
    assert torch.equal(fxq.load(tmp_path / "b", operators=["fxq_tests.triple"])(x), q(x))


def test_a_bundle_replaces_a_bundle_and_nothing_else(bundle, quantized, tmp_path):
    eight = fxq.quantize(toy(), [X], recipe(8))
    assert fxq.save(eight, bundle) == bundle
    assert torch.equal(fxq.load(bundle)(X), eight(X))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle"]
    (bundle / "notes.md").write_text("mine")
    with pytest.raises(fxq.BundleError, match=r"the folder has other content \(notes.md\)"):
        fxq.save(quantized, bundle)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fxq.BundleError, match="it is a file; a bundle is a folder"):
        fxq.save(quantized, tmp_path / "file")
    assert fxq.save(quantized, tmp_path / "new" / "deep") == tmp_path / "new" / "deep"


@pytest.mark.parametrize("step", ["write_tensors", "rename"])
def test_a_failed_save_leaves_the_old_bundle(bundle, quantized, tmp_path, monkeypatch, step):
    before = {name: (bundle / name).read_bytes() for name in FILES}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "write_tensors":
        monkeypatch.setattr("fxq.export.bundle.write_tensors", fail)
    else:
        rename = type(bundle).rename
        monkeypatch.setattr(
            type(bundle), "rename", lambda a, b: fail() if b == bundle and not a.name.endswith(".old") else rename(a, b)
        )
    with pytest.raises(fxq.BundleError, match=r"cannot save .*No space left on device"):
        fxq.save(fxq.quantize(toy(), [X], recipe(8)), bundle)
    monkeypatch.undo()
    assert {name: (bundle / name).read_bytes() for name in FILES} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle"]
    assert torch.equal(fxq.load(bundle)(X), quantized(X))


def test_a_relative_path_is_a_path(quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fxq.save(quantized, "here")
    assert torch.equal(fxq.load("here")(X), quantized(X))


def test_a_loaded_module_is_optimized_as_the_one_it_was_saved_from(quantized, bundle):
    fresh, loaded = fxq.optimize(quantized), fxq.optimize(fxq.load(bundle))
    rows_of = [
        [(row.layer, row.kernel, re.sub(r"\bs\d+", "s", str(row.remarks))) for row in fxq.summary(module).rows]
        for module in (fresh, loaded)
    ]
    assert rows_of[0] == rows_of[1] and torch.equal(fresh(X), loaded(X))
