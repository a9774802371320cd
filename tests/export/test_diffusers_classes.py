"""Folders of transformers with other forms of attention and modulation than Wan's."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fxq
from fxq.export.diffusers_folder import save_diffusers
from fxq.models.diffusers_folder import load_folder
from fxq.passes.methods.ranges import MinMax
from tests.toys import recipe

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
CASES = {case.name: case for case in pytest.importorskip("tests.diffusers.configs").CAPTURED}
NAMES = [
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "CogVideoXTransformer3DModel (1.5)",
    "SkyReelsV2Transformer3DModel",
    "StableAudioDiTModel",
]


def tensors(output):
    leaves = pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.sweep) for name in NAMES[2:])])
def test_the_class_reads_the_folder_of_its_quantized_form(name, tmp_path):
    from fxq.integrations.diffusers import register

    case = CASES[name]
    case.build().save_pretrained(tmp_path / "original")
    model = load_folder(tmp_path / "original")
    quantized = fxq.quantize(model, [case.batch(1)], recipe(methods=(MinMax(),)), progress=False)
    register()
    reloaded = type(model).from_pretrained(save_diffusers(quantized, model, tmp_path / "quantized"))
    want, got = tensors(quantized(**case.batch(9))), tensors(reloaded(**case.batch(9)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
