"""Names of Wan's tensors: the original ones and those of diffusers, one to one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

ORIGINAL, DIFFUSERS, OWN = "original", "diffusers", "own"
"""Styles of names; ``OWN`` leaves a model's names alone."""

_ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)
_BLOCK = (
    *((f"self_attn.{a}", f"attn1.{b}") for a, b in _ATTENTION),
    *((f"cross_attn.{a}", f"attn2.{b}") for a, b in _ATTENTION),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "norm3"),
    ("norm3", "norm2"),
)
_TOP = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)
_BLOCK_NAME = re.compile(r"blocks\.\d+\.")
_IN_BLOCK = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.")
_SIGNS = {ORIGINAL: re.compile(r"blocks\.\d+\.self_attn\.q\."), DIFFUSERS: re.compile(r"blocks\.\d+\.attn1\.to_q\.")}


@dataclasses.dataclass(frozen=True)
class Naming:
    """The style of a model's names and the prefix before them, such as ``model.``."""

    style: str
    prefix: str = ""

    @classmethod
    def of(cls, names: Iterable[str]) -> Naming:
        """Recognise the style of tensor names; ``OWN`` for models that are not Wan."""
        for name in names:
            for style, sign in _SIGNS.items():
                if found := sign.search(name):
                    return cls(style, name[: found.start()])
        return cls(OWN)

    @property
    def is_wan(self) -> bool:
        """Whether the names are Wan's, in whatever style."""
        return self.style != OWN

    def in_block(self, layer: str) -> bool:
        """Whether a linear is one of attention or feed-forward in a block of Wan; any is, of other models."""
        return not self.is_wan or bool(_IN_BLOCK.match(self.rename(layer, ORIGINAL) + "."))

    def rename(self, name: str, style: str) -> str:
        """A tensor's or module's name in another style; unchanged where the model is not Wan."""
        if self.style == OWN or style == OWN:
            return name
        name = name.removeprefix(self.prefix)
        if self.style == style:
            return name
        block = _BLOCK_NAME.match(name)
        head = block.group() if block else ""
        pairs = _BLOCK if block else _TOP
        return head + _replace(name[len(head) :], pairs if style == DIFFUSERS else [(b, a) for a, b in pairs])


def _replace(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name
