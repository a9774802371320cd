"""How the runtimes of the exports are told to read them, for model cards; docs/deployment.md has the whole table."""

from __future__ import annotations

BUNDLE = """\
With fxq and its extra `hub` installed:

```sh
fxq verify {where}
```

```python
import fxq

module = fxq.load("{where}")  # a torch.fx.GraphModule of integer operators
fast = fxq.optimize(module)
model = fxq.apply(model, module)  # or its layers in place of the float model's
```

It is read without running code from it: safetensors and JSON, each operator on a list."""

EXPORTS = {
    "comfy": "Put `{weights}` into ComfyUI's `models/diffusion_models`; the node *Load Diffusion Model* opens it.",
    "lightx2v": "Give LightX2V the folder's full path as `dit_quantized_ckpt`, and the scheme of its `config.json`.",
    "vllm-omni": "Give vLLM-Omni the folder as its model; it finds the quantization in `config.json`.",
    "sglang": "Give SGLang the folder as its model; see docs/deployment.md of fxq for the models whose files it reads.",
    "diffusers-torchao": "Read it with `from_pretrained(folder, torch_dtype=...)` of diffusers, torchao installed.",
    "diffusers": "Call `fxq.register()`, then `from_pretrained` of diffusers.",
    "compressed-tensors": "Read it with the package compressed-tensors.",
}
"""By target. Of a plug-in's target nothing is known here."""


def use_of(target: str, where: str, weights: str) -> str:
    """Words on how to read it.

    Args:
        target: of the export; "" for a bundle.
        where: repository or folder.
        weights: name of the first tensor file.
    """
    if not target:
        return BUNDLE.format(where=where)
    said = EXPORTS.get(target, f"It has the format {target!r}.").format(weights=weights)
    return f"```sh\nhf download {where}\n```\n\n{said}"
