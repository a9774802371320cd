"""Ways to store keys and values, one file each, and what they share: fields, packing, the scalar quantizer.

Nothing here knows when a span is stored or where it lies.
"""

from __future__ import annotations

from fxq.cache.codecs.codec import Codec
from fxq.cache.codecs.exact import Exact
from fxq.cache.codecs.fp8 import Float8
from fxq.cache.codecs.int8_attention import Int8Attention
from fxq.cache.codecs.kivi import Kivi
from fxq.cache.codecs.klt import Klt
from fxq.cache.codecs.low_rank import LowRank
from fxq.cache.codecs.prq import Prq
from fxq.cache.codecs.quarot import QuaRot
from fxq.cache.codecs.rtn import PerChannel, PerToken

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Exact, PerToken, PerChannel, Kivi, QuaRot, Float8, LowRank, Prq, Klt, Int8Attention)
}

PRESETS: dict[str, Codec] = {
    "qvg": Prq(stages=1, block=64),
    "qvg_pro": Prq(stages=4, block=16),
    "qvg_int4": Prq(stages=1, block=64, bits=4),
    "int8": PerToken(bits=8, block=32, scale_dtype="bfloat16"),
    "fp8": Float8(),
    "kivi": Kivi(),
    "quarot": QuaRot(),
    "klt": Klt(),
    "klt_model": Klt(fit="model"),
}

__all__ = [
    "CODECS",
    "PRESETS",
    "Exact",
    "Float8",
    "Int8Attention",
    "Kivi",
    "Klt",
    "LowRank",
    "PerChannel",
    "PerToken",
    "Prq",
    "QuaRot",
]
