import pathlib
import re

import torch

import fxq
from fxq.kernels.gemm.activations import ACTIVATIONS

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_the_code_of_the_page_on_passes_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "passes.md").read_text(), re.S)
    assert len(blocks) == 8
    names = {"__name__": "docs_passes"}
    exec(compile("\n".join(blocks), str(DOCS / "passes.md"), "exec"), names)
    assert ACTIVATIONS.pop("relu").reference is torch.relu
    assert "2 linears quantized, 0 kept" in capsys.readouterr().out
    plain = fxq.Recipe(
        name="plain", rules=names["recipe"].rules, methods=names["recipe"].methods[:1], weighting="uniform"
    )
    coarse = fxq.summary(fxq.quantize(names["model"], names["data"], plain))
    assert {row.output_sqnr for row in coarse.rows} != {row.output_sqnr for row in fxq.summary(names["quantized"]).rows}


def test_the_page_on_bundles_names_what_a_layer_stores():
    text = (DOCS / "bundle.md").read_text()
    for name in fxq.core.ir.LAYER_TENSORS:
        assert f"`<layer>.{name}`" in text
    assert f"version {fxq.export.bundle.FORMAT_VERSION}" in text.splitlines()[0]
