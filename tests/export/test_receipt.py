import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxq
from fxq.export import Receipt, read_receipt
from fxq.export.files import write_tensors
from fxq.export.receipt import HEADER_KEY, RECEIPT_VERSION
from tests.toys import recipe, rows, toy

X = rows(5, 96)


@pytest.fixture(scope="module")
def quantized():
    return fxq.quantize(toy(), [X], recipe(4), progress=False)


@pytest.fixture(scope="module")
def bundle(quantized, tmp_path_factory):
    return fxq.save(quantized, tmp_path_factory.mktemp("bundles") / "b", metrics={"psnr_db": 31.5, "videos": 8})


def test_a_receipt_states_recipe_data_metrics_versions_and_machine(bundle, quantized):
    receipt = read_receipt(bundle)
    facts = fxq.summary(quantized).facts
    assert receipt.recipe == facts["recipe"] and receipt.recipe["name"] == "w4a8"
    assert receipt.calibration_hash == facts["calibration_hash"] and len(receipt.calibration_hash) == 64
    assert receipt.environment == facts["environment"] and receipt.environment["torch"] == torch.__version__
    assert receipt.fxq_version == fxq.__version__ and receipt.receipt_version == RECEIPT_VERSION
    assert receipt.source == ""


def test_metrics_join_what_the_layers_measured(bundle, quantized):
    metrics = read_receipt(bundle).metrics
    quality = [row.output_sqnr for row in fxq.summary(quantized).quantized]
    assert metrics == {
        "layers_quantized": 2,
        "layers_kept": 1,
        "output_sqnr_db_lowest": min(quality),
        "output_sqnr_db_median": max(quality),
        "psnr_db": 31.5,
        "videos": 8,
    }


def test_the_receipt_lies_in_the_header_of_the_tensor_file(bundle):
    with safe_open(bundle / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", HEADER_KEY}
    assert Receipt(**json.loads(metadata[HEADER_KEY])) == read_receipt(bundle / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(1), {1, 2}])
def test_metrics_without_a_json_form_are_refused_before_anything_is_written(quantized, tmp_path, value):
    with pytest.raises(fxq.BundleError, match="metrics must be JSON values by name"):
        fxq.save(quantized, tmp_path / "b", metrics={"m": value})
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_receipt_says_so(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(fxq.BundleError, match="carries no receipt: it was not written by fxq"):
            read_receipt(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the receipt is damaged"),
        ("[]", "receipt version None, this fxq reads 1"),
        ('{"receipt_version": 2}', "receipt version 2"),
        ('{"receipt_version": 1}', "the receipt is damaged"),
    ],
)
def test_a_damaged_receipt_is_refused(tmp_path, text, message):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={HEADER_KEY: text})
    with pytest.raises(fxq.BundleError, match=message):
        read_receipt(tmp_path)


def test_places_without_tensors_are_refused(tmp_path):
    with pytest.raises(fxq.BundleError, match="holds no safetensors file"):
        read_receipt(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(fxq.BundleError, match="cannot be read"):
            read_receipt(path)


def test_tensor_files_of_equal_content_are_equal_bytes(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {key: f'"{key}" é \\' for key in "zyxabc"}
    written = []
    for number in range(4):
        write_tensors(tensors, tmp_path / f"{number}", dict(sorted(metadata.items(), reverse=number % 2 == 1)))
        written.append((tmp_path / f"{number}").read_bytes())
    assert len(set(written)) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "0").items())


def test_tensors_that_share_memory_are_stored_twice(tmp_path):
    x = torch.arange(6.0)
    write_tensors({"whole": x, "again": x, "part": x.view(2, 3).T}, tmp_path / "f", {"format": "pt"})
    loaded = load_file(tmp_path / "f")
    assert torch.equal(loaded["again"], x) and torch.equal(loaded["part"], x.view(2, 3).T)
