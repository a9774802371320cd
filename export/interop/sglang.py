"""SGLang: rotated int8 or 4-bit linears of the blocks, each with ComfyUI's marker, under the names of diffusers."""

from __future__ import annotations

from fxq.export.interop.comfy import marked_file, marked_header
from fxq.export.interop.layers import InteropError, Options, Output, StoredLayer, StoredModel, refuse_asymmetric
from fxq.export.interop.names import DIFFUSERS
from fxq.export.interop.rotation import rotation_size

FILE = "diffusion_pytorch_model.safetensors"
_READERS = (
    "SGLang 0.5.23 asks for these markers when it loads MiniMax-H3 and text encoders; its Wan transformers do not: "
    "serve those with its quantization convrot_int8 from the float model, which is rounded to the same grid then"
)


def build(model: StoredModel, options: Options) -> Output:
    """8 bits as ``int8_tensorwise`` with ``convrot``, 4 bits as ``asym_w4a8_int8``, as for ComfyUI.

    Linears outside of Wan's blocks are plain ones there and are written in floating point. ``config.json`` is the
    model's own, if it is given: a ``quantization_config`` of this method would have the server round floats.

    Raises:
        InteropError: without the original weights, as plain int8 is taken for an embedding there; for a bundle with 8-
            and 4-bit layers; for a width that no rotation divides.
    """
    refuse_asymmetric(model, "SGLang")
    layers = {name: stored for name, stored in model.layers.items() if model.naming.in_block(name)}
    if lacking := [name for name, stored in layers.items() if stored.original is None and not _as_it_is(stored)]:
        raise InteropError(
            f"SGLang reads integers of rotated weights only, and {len(lacking)} layers of the bundle are not rotated "
            f"({', '.join(lacking[:3])}): give the weights that were quantized, which are rounded once (original=..., "
            "--original FILE), or quantize with the preset w8a8-single-convrot"
        )
    by_bits: dict[int, list[str]] = {}
    for name, stored in layers.items():
        by_bits.setdefault(stored.bits, []).append(name)
    if len(by_bits) > 1:
        some = "; ".join(f"{bits} bits: {', '.join(names[:2])}" for bits, names in sorted(by_bits.items()))
        raise InteropError(
            f"SGLang reads one width per file, the bundle has {some}. Quantize all with w8a8 or with w4a8"
        )
    if odd := [n for n, s in layers.items() if rotation_size(s.plan.in_features) is None]:
        raise InteropError(
            f"SGLang rotates groups of 256, 64 or 16 channels, which divide the width of {len(odd)} layers not "
            f"({', '.join(odd[:3])}): keep them by a rule"
        )
    tensors, markers, records = marked_file(model, DIFFUSERS, options, blocks_only=True)
    return Output(
        tensors={FILE: (tensors, marked_header(markers))},
        documents={"config.json": dict(options.base_config)} if options.base_config else {},
        records=records,
        notes=(_READERS,),
    )


def _as_it_is(stored: StoredLayer) -> bool:
    """Whether the bundle's integers are those of the format."""
    return stored.bits == 8 and stored.rotation is not None and stored.single_scale() is not None
