"""Families that are no text-to-video causal Wan, known by the names of their tensors or by what their config says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

DIFFUSERS_WAY = (
    "load it with its own code and quantize that module with recorded calls (fxq.record, docs/diffusers.md), or as a "
    "diffusers folder (--model diffusers) where diffusers has its class"
)
OWN_WAY = "write a rollout of its own code (docs/tutorial.md) and quantize with --model package.module:function"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A family that is not read: ``sign`` is found in names of its tensors, ``kinds`` in its config; ``way`` is out."""

    name: str
    sign: str
    reason: str
    way: str = OWN_WAY
    kinds: tuple[str, ...] = ()


FOREIGN = (
    Foreign("MAGI-1", r"^videodit_blocks\.", "another transformer with attention of its own", DIFFUSERS_WAY),
    Foreign(
        "LongCat-Video",
        r"^blocks\.\d+\.(attn\.qkv|adaLN_modulation|cross_attn\.kv_linear)\.",
        "another transformer, which modulates and attends in its own way",
        DIFFUSERS_WAY,
        ("LongCatVideoTransformer3DModel",),
    ),
    Foreign(
        "Matrix-Game 2",
        r"^blocks\.\d+\.action_model\.",
        "an image-to-video Wan with keyboard and mouse modules in its blocks",
    ),
    Foreign("VACE", r"^vace_(blocks|patch_embedding)\b", "a Wan with control blocks", DIFFUSERS_WAY, ("vace",)),
    Foreign(
        "Wan-Animate",
        r"^(motion_encoder|face_adapter|face_encoder)\.",
        "a Wan with pose and face encoders",
        DIFFUSERS_WAY,
        ("animate",),
    ),
    Foreign("Wan-S2V", r"^(audio_injector|casual_audio_encoder)\.", "a Wan driven by sound", DIFFUSERS_WAY, ("s2v",)),
    Foreign("HunyuanVideo", r"^(double_blocks|txt_in)\b", "another transformer", DIFFUSERS_WAY),
    Foreign(
        "an image-to-video Wan",
        r"^(img_emb\.proj\.\d|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\.|condition_embedder\.image_embedder\.)",
        "its blocks attend to an image too, which the causal denoiser here has no input for",
        DIFFUSERS_WAY,
        ("i2v", "flf2v", "fl2v"),
    ),
)


def foreign_names(names: Iterable[str]) -> str:
    """Which foreign family tensors of these names are of, why it is refused and the way out; "" for none."""
    listed = list(names)
    for family in FOREIGN:
        if any(re.search(family.sign, name) for name in listed):
            return _said(family)
    return ""


def foreign_kind(kind: str) -> str:
    """As :func:`foreign_names`, by the ``model_type`` or ``_class_name`` of a config."""
    return next((_said(family) for family in FOREIGN if kind in family.kinds), "")


def _said(family: Foreign) -> str:
    return f"{family.name}: {family.reason}. Only text-to-video causal Wan models are read; {family.way}"
