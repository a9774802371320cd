"""An export target from outside the package: codes and tables, as a runtime with look-up products might want them."""

import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import fxq
from fxq.cli import app
from fxq.export.interop import export_bundle
from tests.toys import recipe, rows, toy

SOURCE = '''
"""A byte per weight that is an index into one table of values per output channel."""

import torch

from fxq.export.interop import LayerRecord, Output


def build(model, options):
    """``codes`` uint8 [N, K] and ``table`` float32 [N, L]: weight[n, k] = table[n, codes[n, k]]."""
    tensors = dict(model.floats)
    records = [LayerRecord(layer=name, name=name, form="float", note="kept by the recipe") for name in model.kept]
    for name, layer in model.layers.items():
        pairs = [torch.unique(row, return_inverse=True) for row in layer.weight()]
        table = torch.zeros(len(pairs), max(len(values) for values, _ in pairs))
        for row, (values, _) in zip(table, pairs, strict=True):
            row[: len(values)] = values
        tensors[f"{name}.codes"] = torch.stack([codes for _, codes in pairs]).to(torch.uint8)
        tensors[f"{name}.table"] = table
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
        records.append(LayerRecord(layer=name, name=name, form="codes"))
    sizes = {name: list(layer.integers.shape) for name, layer in model.layers.items()}
    return Output(tensors={"codes.safetensors": (tensors, {})}, documents={"sizes.json": sizes}, records=records)
'''


@pytest.fixture
def bundle(tmp_path):
    return fxq.save(fxq.quantize(toy(), [rows(9, 96)], recipe(4), progress=False), tmp_path / "bundle")


def test_the_command_line_writes_it_by_name_and_the_numbers_are_the_bundles(outside, bundle, tmp_path):
    outside.install("codes_for_fxq", SOURCE, exports={"codes": "build"})
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(bundle), "--target", "codes", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["target"] == "codes" and report["files"] == ["codes.safetensors", "sizes.json"]
    assert {r["layer"]: r["form"] for r in report["layers"]} == {
        "blocks.0.up": "codes",
        "blocks.0.down": "codes",
        "head": "float",
    }
    assert json.loads((out / "sizes.json").read_text()) == {"blocks.0.up": [64, 96], "blocks.0.down": [96, 64]}
    stored, model = load_file(out / "codes.safetensors"), toy()
    for name in ("blocks.0.up", "blocks.0.down"):
        codes, table = stored[f"{name}.codes"].long(), stored[f"{name}.table"]
        assert int(codes.max()) < 32, "two scales of 16 values at most"
        model.get_submodule(name).weight.data = table.gather(1, codes)
    quantized, x = fxq.load(bundle), rows(20, 96, seed=4)
    want, got = quantized(x), model(x).detach()
    assert float((want - got).norm() / want.norm()) < 0.02, "what is left is the rounding of inputs"
    assert fxq.read_receipt(out).source == report["source"]


def test_an_unknown_target_names_the_plugins_too(outside, bundle, tmp_path):
    outside.install("codes_for_fxq", SOURCE, exports={"codes": "build"})
    done = CliRunner().invoke(app, ["export", str(bundle), "--target", "code", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "codes" in done.output and not outside.imported("codes_for_fxq")
    with pytest.raises(fxq.BundleError, match=r"unknown target 'code': expected one of lightx2v, .*, codes"):
        export_bundle(bundle, "code", tmp_path / "out")


def test_the_target_is_unknown_without_the_distribution(bundle, tmp_path):
    with pytest.raises(fxq.BundleError, match="unknown target 'codes'"):
        export_bundle(bundle, "codes", tmp_path / "out")
