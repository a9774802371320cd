"""Settings of published ``config.json`` files under Wan's official names, whichever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxq.models.published.foreign import foreign_kind

_SAME = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_frames_per_block": "num_frame_per_block",
}
"""Names of diffusers and FastVideo -> official ones."""
_WITHOUT_EFFECT = {"rope_max_seq_len", "pos_embed_seq_len", "sliding_window_num_frames", "inject_sample_info"}
_IMAGE = ("image_dim", "added_kv_proj_dim")
_NORMS = {"rms_norm_across_heads": True, None: False, True: True, False: False}
_READ = ("t2v", "ti2v")


def official(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any published config under their official names, without what says nothing.

    ``ti2v`` (Wan2.2 5B, LongLive 2) is text-to-video with the image in the first latent frame: its tensors are those of
    ``t2v`` with 48 channels.

    Raises:
        ValueError: naming the family, when it is another kind of model.
    """
    found = {key: value for key, value in settings.items() if not key.startswith("_") and key not in _WITHOUT_EFFECT}
    kind = str(found.pop("model_type", "t2v"))
    for said in (kind, str(settings.get("_class_name", ""))):
        if reason := foreign_kind(said):
            raise ValueError(f"model_type {kind!r}: {reason}" if said == kind else reason)
    if kind not in _READ:
        raise ValueError(f"model_type {kind!r}: only text-to-video causal Wan models are supported, 't2v' and 'ti2v'")
    if named := [key for key in _IMAGE if found.pop(key, None) is not None]:
        raise ValueError(f"{named[0]} is set: {foreign_kind('i2v')}")
    width, heads = found.pop("attention_head_dim", None), found.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int):
        found.setdefault("dim", width * heads)
    for old, new in _SAME.items():
        if old in found:
            found.setdefault(new, found.pop(old))
    if found.get("out_dim", 0) is None:
        del found["out_dim"]
        if "in_dim" in found:
            found["out_dim"] = found["in_dim"]
    if "qk_norm" in found and not isinstance(found["qk_norm"], int):
        if not (found["qk_norm"] is None or isinstance(found["qk_norm"], str)) or found["qk_norm"] not in _NORMS:
            raise ValueError(f"qk_norm {found['qk_norm']!r}: expected rms_norm_across_heads, as Wan has it")
        found["qk_norm"] = _NORMS[found["qk_norm"]]
    return found
