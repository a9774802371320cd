import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxq
from fxq.core.ir import example_value, put_tensor
from fxq.export import bundle as bundle_module
from fxq.export import read_manifest, verify_bundle
from fxq.export.fingerprint import take_fingerprint
from fxq.export.inputs import input_entries, noise, seeded_inputs
from fxq.kernels import native
from fxq.kernels.gemm import op as gemm
from tests.export.test_bundle import change, resign
from tests.toys import recipe, rows, toy, wan_rollout

X = rows(5, 96)
CALL = "one call against the fingerprint"


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [X], recipe(4), progress=False)


@pytest.fixture(scope="module")
def original(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "original")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    rollout = wan_rollout()
    module = fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False)
    return module, fxq.save(module, tmp_path_factory.mktemp("bundles") / "wan")


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def status(verdict):
    return {check.name: check.status for check in verdict.checks}


def detail(verdict, name):
    return next(check.detail for check in verdict.checks if check.name == name)


def rewrite(folder, edit, metadata=None):
    """Change tensors and make hashes and manifest fit."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        header = content.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata or header)
    resign(folder)


def test_a_sound_bundle_passes_every_check_and_names_the_kernels(original):
    verdict = verify_bundle(original)
    assert verdict.ok and set(status(verdict).values()) == {"passed"}
    assert [(item.layer, item.bits, item.problems) for item in verdict.layers] == [
        ("blocks.0.up", "W4A8", ()),
        ("blocks.0.down", "W4A8", ()),
    ]
    for item in verdict.layers:
        assert item.linear_kernel == gemm.ON_CPU and item.quantize_kernel in ("eager", native.name())
    slow = gemm.in_float_note() in detail(verdict, "planned layers are quantized")
    assert slow == (gemm.ON_CPU == gemm.IN_FLOAT)
    assert json.loads(json.dumps(verdict.to_json()))["ok"] is True


def test_a_denoiser_with_varying_sizes_has_a_fingerprint_too(wan):
    verdict = verify_bundle(wan[1])
    assert verdict.ok and status(verdict)[CALL] == "passed", detail(verdict, CALL)


def test_a_flipped_bit_fails_the_first_check_and_stops(bundle):
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (bundle / "model.safetensors").write_bytes(content)
    verdict = verify_bundle(bundle)
    assert not verdict.ok and not verdict.layers and len(verdict.checks) == 1
    assert "does not have the hash the manifest states" in verdict.checks[0].detail


def test_no_bundle_is_a_failed_check(tmp_path):
    assert "a bundle is a folder made by fxq.save" in verify_bundle(tmp_path).checks[0].detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "has no CUDA device"), ("abacus", "device abacus is invalid")]
)
def test_a_device_that_is_not_there_is_a_failed_check(original, device, message):
    verdict = verify_bundle(original, device)
    assert not verdict.ok and message in verdict.checks[0].detail


@pytest.mark.gpu
def test_the_fingerprint_of_a_cpu_holds_on_a_gpu(original, wan):
    for path in (original, wan[1]):
        verdict = verify_bundle(path, "cuda")
        assert verdict.ok, verdict
        assert {item.linear_kernel for item in verdict.layers} == {"triton"}


@pytest.mark.parametrize("name", ["blocks.0.up.weight", "blocks.0.down.weight_scale", "head.bias"])
def test_a_signed_change_of_a_tensor_fails_the_fingerprint(bundle, name):
    def edit(tensors):
        tensors[name] = tensors[name].flip(0).contiguous() if name.endswith("weight") else tensors[name] * 1.2 + 0.1

    rewrite(bundle, edit)
    verdict = verify_bundle(bundle)
    assert not verdict.ok and status(verdict)[CALL] == "failed"
    assert "output 0 differs by" in detail(verdict, CALL) and "tolerance 0.01" in detail(verdict, CALL)


def test_rounding_of_another_kernel_passes_the_fingerprint(bundle):
    rewrite(bundle, lambda tensors: tensors.update({"head.weight": tensors["head.weight"] * (1 + 1e-4)}))
    assert verify_bundle(bundle).ok


def test_a_float_twin_of_a_quantized_weight_is_found(tmp_path):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = toy().blocks
            self.shadow = nn.Parameter(self.blocks[0].up.weight.detach().clone())

        def forward(self, x):
            return self.blocks[0](x) + (x @ self.shadow.T).sum()

    verdict = verify_bundle(fxq.save(fxq.quantize(Doubled().eval(), [X], recipe(4), progress=False), tmp_path / "b"))
    assert verdict.layers[0].problems == ("its weight is stored in float as well, as shadow",)
    assert not verdict.ok and status(verdict)["planned layers are quantized"] == "failed"


def test_a_layer_without_a_kernel_is_a_failure(original, monkeypatch):
    monkeypatch.setattr("fxq.kernels.used", lambda *args: "reference")
    verdict = verify_bundle(original)
    assert not verdict.ok
    assert verdict.layers[0].problems == ("no kernel is bound on cpu; it would run on the reference implementation",)


@pytest.mark.parametrize(
    ("operator", "position", "value", "problem"),
    [("quantize_act", 5, 6, "6-bit inputs, planned 8")],
)
def test_integers_of_another_width_are_found(bundle, operator, position, value, problem):
    def edit(data):
        node = next(node for node in data["nodes"] if operator in node["target"])
        node["args"][position] = value

    change(bundle, "graph.json", edit)
    verdict = verify_bundle(bundle)
    assert problem in verdict.layers[0].problems and not verdict.ok


def test_a_receipt_that_is_not_the_manifests_fails(bundle):
    change(bundle, "manifest.json", lambda data: data["facts"].update(calibration_hash="0" * 64))
    verdict = verify_bundle(bundle)
    assert status(verdict)["receipt"] == "failed" and "its calibration_hash is not the manifest's" in detail(
        verdict, "receipt"
    )


def test_a_bundle_from_before_receipts_and_fingerprints_loads_and_passes(bundle, quantized):
    rewrite(bundle, lambda tensors: None, {"format": "pt"})
    change(bundle, "manifest.json", lambda data: [data.pop(key) for key in ("inputs", "fingerprint")] and None)
    verdict = verify_bundle(bundle)
    assert verdict.ok and status(verdict)["receipt"] == status(verdict)[CALL] == "skipped"
    assert detail(verdict, CALL).startswith("no fingerprint recorded")
    assert "carries no receipt" in detail(verdict, "receipt")
    assert torch.equal(fxq.load(bundle)(X), quantized(X))


def test_a_fingerprint_can_be_left_out(quantized, tmp_path):
    path = fxq.save(quantized, tmp_path / "b", fingerprint=False)
    assert read_manifest(path).fingerprint is None
    assert detail(verify_bundle(path), CALL) == "no fingerprint recorded: none was taken when it was saved"


@pytest.mark.parametrize(
    ("name", "limit", "reason"),
    [
        ("MAX_PRODUCTS", 10, "one call multiplies .* times, more than 10"),
        ("MAX_INPUT_VALUES", 3, "values, more than 3"),
    ],
)
def test_a_call_that_would_take_long_is_not_made(quantized, tmp_path, monkeypatch, name, limit, reason):
    monkeypatch.setattr(f"fxq.export.fingerprint.{name}", limit)
    path = fxq.save(quantized, tmp_path / "b")
    with pytest.raises(AssertionError, match=reason):
        assert not detail(verify_bundle(path), CALL)


def test_a_graph_that_refuses_seeded_inputs_says_why(quantized, monkeypatch):
    def refuse(*args):
        raise ValueError("not these\nand more")

    monkeypatch.setattr("fxq.export.fingerprint.call_flat", refuse)
    found = take_fingerprint(quantized, input_entries(quantized))
    assert found.outputs == () and found.reason == "the graph refuses seeded inputs: not these"


def test_an_output_that_is_not_finite_gives_no_fingerprint(quantized, tmp_path):
    module = fxq.load(fxq.save(quantized, tmp_path / "b"))
    put_tensor(module, "head.bias", torch.full((7,), torch.inf))
    assert "no finite" in take_fingerprint(module, input_entries(module)).reason


def test_saving_what_was_loaded_gives_the_same_bytes(wan, tmp_path):
    again = fxq.save(fxq.load(wan[1]), tmp_path / "again")
    for name in (bundle_module.TENSORS, bundle_module.GRAPH, bundle_module.MANIFEST):
        assert (again / name).read_bytes() == (wan[1] / name).read_bytes()


def test_a_loaded_graph_carries_values_with_the_sizes_that_vary(wan):
    before, after = wan[0], fxq.load(wan[1])
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=True):
        a, b = example_value(old), example_value(new)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and [isinstance(s, int) for s in a.shape] == [isinstance(s, int) for s in b.shape]
            assert [s for s in a.shape if isinstance(s, int)] == [s for s in b.shape if isinstance(s, int)]
    entries = read_manifest(wan[1]).inputs
    assert entries == input_entries(after)
    assert entries[0].sizes == ("d0", 2, 3, 4, 6) and entries[1].sizes == ("d0", 2)


def test_inputs_of_an_unknown_dtype_are_refused(bundle):
    change(bundle, "manifest.json", lambda data: data["inputs"][0].update(dtype="load"))
    with pytest.raises(fxq.BundleError, match="'load' is no dtype of torch"):
        fxq.load(bundle)


def test_seeded_inputs_are_pinned():
    assert [round(float(v), 9) for v in noise(3, 7)] == [0.605826343, 0.147314881, 0.814949836]
    values = noise(20000, 1)
    assert abs(float(values.mean()) - 0.5) < 0.01 and abs(float(values.var()) - 1 / 12) < 0.002
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.02


def test_integers_and_flags_get_values_any_index_allows():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x, index, mask):
            return torch.where(mask, self.linear(x)[index], 0.0)

    batch = (rows(4, 64), torch.tensor([2, 1]), torch.tensor([[True], [False]]))
    module = fxq.quantize(Typed().eval(), [batch], recipe(), example_inputs=batch, progress=False)
    x, index, mask = seeded_inputs(input_entries(module), 1, torch.device("cpu"))
    assert x.dtype == torch.float32 and index.tolist() == [0, 0] and mask.all() and mask.dtype == torch.bool
    assert take_fingerprint(module, input_entries(module)).outputs
