"""What exports for other runtimes are made of: a bundle's layers as plain weights, options, and what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.ir import LayerPlan
from fxq.export.files import BundleError
from fxq.export.interop.names import Naming
from fxq.export.interop.rotation import rotate
from fxq.export.receipt import Receipt

PER_TOKEN = "int8 per token, measured at run time"
FLOAT8_PER_TOKEN = "float8 per token, measured at run time"
FLOAT8_STATIC = "float8 with a static scale per tensor"


class InteropError(BundleError):
    """A bundle that a target's format cannot hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller of an export may choose.

    ``float_dtype`` for tensors that stay in floating point, None keeps each one's own; ``widen`` allows int4 layers to
    be stored in a byte where the target has no int4; ``base_config`` is the model's ``config.json`` to be completed.
    ``original`` are the float weights that were quantized, by name, for formats whose grid is not the bundle's: they
    are rounded once instead of twice. ``causal`` says whether the model generates chunk by chunk; None: as its inputs
    show. ``per_block`` asks for a file per block where the target can load them so.
    """

    float_dtype: torch.dtype | None = None
    widen: bool = False
    base_config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    original: Mapping[str, Tensor] | None = None
    causal: bool | None = None
    per_block: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One quantized linear: integers int8 [N, K] in group order, ``weight_scale`` [G, N], ``dtype`` of its result.

    Of FP8 layers ``integers`` are float8_e4m3fn. ``input_scale`` float32 [G] where inputs have static scales.

    ``original`` is the float weight [N, K] that was quantized, where the caller gave it. ``rotation`` counts the
    channels that inputs and integers are rotated in by ConvRot, None where they are not.
    """

    plan: LayerPlan
    integers: Tensor
    weight_scale: Tensor
    perm: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    original: Tensor | None = None
    rotation: int | None = None
    input_scale: Tensor | None = None

    @property
    def is_float8(self) -> bool:
        """Whether weights and inputs are float8."""
        return self.plan.quantization.is_float8

    @property
    def bits(self) -> int:
        """Bits of the weight's integers."""
        return self.plan.quantization.code_bits

    def weight(self) -> Tensor:
        """float32 [N, K]: what the integers stand for, channels in the model's order and as the model has them."""
        stored = self._ordered(numerics.dequantize_weight(self.integers, self.weight_scale, self.plan.split))
        return stored if self.rotation is None else rotate(stored, self.rotation)

    def single_scale(self) -> tuple[Tensor, Tensor] | None:
        """int8, or float8, [N, K] in the model's order and their scale float32 [N, 1]; None with two scales."""
        if len(self.weight_scale) > 1:
            return None
        return self._ordered(self.integers), self.weight_scale[0].unsqueeze(1)

    def _ordered(self, tensor: Tensor) -> Tensor:
        return tensor if self.perm is None else tensor[:, self.perm.long().argsort()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A bundle's content.

    ``layers`` are the quantized linears by name, ``kept`` the names of the others, ``floats`` every tensor outside of
    quantized linears (constants that capture made are left out and named in ``constants``). ``head_size``: channels of
    a head of the keys that a causal Wan takes from its cache, None where a model takes none.
    """

    layers: dict[str, StoredLayer]
    kept: tuple[str, ...]
    floats: dict[str, Tensor]
    constants: tuple[str, ...]
    naming: Naming
    receipt: Receipt
    head_size: int | None = None

    def causal(self, options: Options) -> bool:
        """Whether the model generates chunk by chunk with a cache: as the caller says, else as its inputs show."""
        return self.head_size is not None if options.causal is None else options.causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What became of one linear: ``form`` it is stored in and the cost in dB against the bundle's weight.

    ``weight_sqnr_db`` is 10 log10 of the bundle's weight energy over that of the change; None: not changed at all.
    ``original_sqnr_db`` is the same of the original weight, where the caller gave it: what counts.
    """

    layer: str
    name: str
    form: str
    weight_sqnr_db: float | None = None
    note: str = ""
    original_sqnr_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a target writes: tensor files with their metadata, JSON documents, and what became of each linear.

    ``notes`` are for the reader of the report. ``static`` says that the file holds the bundle's static input scales.
    """

    tensors: dict[str, tuple[dict[str, Tensor], dict[str, str]]]
    documents: dict[str, object]
    records: list[LayerRecord]
    activations: str = PER_TOKEN
    notes: tuple[str, ...] = ()
    static: bool = False
