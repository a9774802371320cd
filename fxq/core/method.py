"""What is asked of linears and attentions, schemes, and what chooses the integers and scales of a linear: a method."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.core.rows import Moments, RowSums
from fxq.kernels import float8

INTEGER, FLOAT8 = "int", "float8_e4m3fn"
"""Formats of the numbers that layers are quantized to."""

GROUPED = "int in groups"
"""Beside them what methods choose for a ``weight_group``."""


class RecipeError(ValueError):
    """A recipe that cannot be read or that does not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one linear is quantized.

    ``format`` is what weights and inputs become: ``"int"``, of ``weight_bits`` and ``input_bits``, or
    ``"float8_e4m3fn"`` (:mod:`fxq.kernels.float8`), always of 8 bits and symmetric.

    ``weight_bits`` 4..8 (per output channel, symmetric; with ``weight_group`` 32 every 32 input channels multiply it by
    1..15, arXiv 2405.04532), ``input_bits`` 2..8 (static per tensor, asymmetric),
    ``dual_scale`` lets outlier channels have their own scales; ``tau``, ``alpha`` and ``align`` are the outlier rule
    (arXiv 2605.21072), ``reconstruct`` allows methods that learn from data on this layer. With ``per_token`` the input
    scales are measured per token at run time, symmetric: no input scale, zero point or calibration is needed.
    ``asymmetric`` measures a zero point with each of them; static inputs always have one.
    """

    weight_bits: int = 8
    input_bits: int = 8
    dual_scale: bool = True
    tau: float = 3.5
    alpha: float = 1.2
    align: int = 32
    reconstruct: bool = True
    per_token: bool = False
    asymmetric: bool = False
    format: str = INTEGER
    weight_group: int = 0

    def __post_init__(self) -> None:
        if self.format not in (INTEGER, FLOAT8):
            raise RecipeError(f"format = {self.format!r}: expected {INTEGER!r} or {FLOAT8!r}")
        for name in ("weight_bits", "input_bits", "align", "weight_group"):
            if type(value := getattr(self, name)) is not int:
                raise RecipeError(f"{name} = {value!r}: expected an integer")
        if self.weight_bits not in range(4, 9):
            raise RecipeError(f"weight_bits = {self.weight_bits}: expected 4..8")
        if self.weight_group not in (0, numerics.PACK_BLOCK) or (self.weight_group and self.weight_bits != 4):
            told = f"weight_group = {self.weight_group} with weight_bits = {self.weight_bits}"
            raise RecipeError(f"{told}: expected 0, or {numerics.PACK_BLOCK} with weights of 4 bits")
        if not 2 <= self.input_bits <= 8:
            raise RecipeError(f"input_bits = {self.input_bits}: expected 2..8")
        if self.align <= 0 or self.align % 32:
            raise RecipeError(f"align = {self.align}: expected a positive multiple of 32, the packing block")
        if self.asymmetric and not self.per_token:
            raise RecipeError("asymmetric without per_token: static inputs always have a zero point; set per_token too")
        if self.is_float8 and (self.weight_bits, self.input_bits) != (8, 8):
            bits = f"weight_bits = {self.weight_bits}, input_bits = {self.input_bits}"
            raise RecipeError(f"{bits} with format {FLOAT8!r}, whose numbers have 8 bits: leave both at 8")
        if self.is_float8 and self.asymmetric:
            raise RecipeError(f"asymmetric with format {FLOAT8!r}, which has no zero point: set asymmetric to false")

    def refuse_budget(self, pattern: str) -> None:
        """Raise RecipeError when a budget cannot choose bits of the layers of a rule."""
        if self.weight_group:
            raise RecipeError(
                f"rule {pattern!r}: weight_group with a budget, which chooses among weights of one scale; leave out "
                "one of the two"
            )
        if self.is_float8:
            raise RecipeError(
                f"rule {pattern!r}: format {self.format!r} with a budget, which chooses the bits of integers; leave "
                "out one of the two"
            )

    @property
    def is_float8(self) -> bool:
        """Whether weights and inputs are float8 instead of integers."""
        return self.format == FLOAT8

    @property
    def numbers(self) -> str:
        """What methods choose: the format, or :data:`GROUPED`."""
        return GROUPED if self.weight_group else self.format

    @property
    def code_bits(self) -> int:
        """Bits of the integers that kernels read: 4, packed, or 8, in which lie those of 5 to 8 bits and of groups."""
        return 4 if self.weight_bits == 4 and not self.weight_group else 8

    @property
    def integer_bits(self) -> int:
        """Bits that the integers need which kernels multiply: a code times the multiplier of its group needs 8."""
        return 8 if self.weight_group else self.weight_bits

    @property
    def is_narrow(self) -> bool:
        """Whether weights have fewer bits than the integers that hold them in memory: files hold their own."""
        return self.weight_bits < self.code_bits

    def weight_bytes(self, outputs: int, width: int) -> int:
        """Bytes of a stored weight [outputs, width], with the multipliers of its groups."""
        row = self.weight_bits * -(-width // 8) if self.is_narrow else width * self.weight_bits // 8
        return outputs * (row + (-(-width // (2 * self.weight_group)) if self.weight_group else 0))

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of stored weights: packed uint8, int8 or float8."""
        return float8.E4M3 if self.is_float8 else torch.uint8 if self.code_bits == 4 else torch.int8

    @property
    def input_dtype(self) -> torch.dtype:
        """Of quantized inputs: int8 or float8."""
        return float8.E4M3 if self.is_float8 else torch.int8

    @property
    def label(self) -> str:
        """Short name such as W4A8, W4g32A8 or FP8; the same for static and per-token inputs."""
        group = f"g{self.weight_group}" if self.weight_group else ""
        return "FP8" if self.is_float8 else f"W{self.weight_bits}{group}A{self.input_bits}"

    @property
    def detail(self) -> str:
        """The label, and how inputs are scaled where that is not static: "W4A8 per token, asymmetric"."""
        measured = " per token, asymmetric" if self.asymmetric else " per token"
        return self.label + measured if self.per_token else self.label


STORED = "int8"
"""The scheme of attention whose codes a cache may store, by codec int8_attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionScheme:
    """Attentions whose products are of 8 bits, where calibration shows that they can be.

    ``scheme`` is a name of :data:`fxq.kernels.ATTENTIONS`. An attention gets its operator when its relative error, root
    mean square over the calibration calls with exact inputs, is at most ``max_error``; those whose place matches a glob
    of ``keep`` stay exact whatever their error.
    """

    scheme: str = STORED
    max_error: float = 0.05
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in kernels.ATTENTIONS:
            raise RecipeError(f"attention: scheme {self.scheme!r}: expected {', '.join(kernels.ATTENTIONS)}")
        if not 0 < self.max_error < math.inf:
            raise RecipeError(f"attention: max_error = {self.max_error}: expected a finite number above 0")

    def keeps(self, place: str) -> bool:
        """Whether a module's attention stays exact because the recipe says so."""
        return any(fnmatch.fnmatchcase(place, pattern) for pattern in self.keep)

    def check_cache(self, integers: bool) -> None:
        """Refuse a cache that is absorbed or encoded, but for the ``integers`` that attention multiplies.

        Raises:
            RecipeError: naming both.
        """
        reads = "attention in integers reads keys and values as they are, or as codec int8_attention stores both"
        if self.scheme != STORED:
            reads = f"no codec stores what it multiplies, but for attention = {STORED!r} int8_attention does"
        elif integers:
            return
        raise RecipeError(
            f"attention = {self.scheme!r} with a cache that is encoded or absorbed: {reads}; leave out one of the two, "
            "or the codecs of the cache"
        )


@dataclasses.dataclass(kw_only=True)
class LayerStatistics:
    """What calibration saw of one linear's input.

    ``low``/``high`` float32 [K]: exact extremes per channel. ``rows`` [R, K]: a random sample of input rows in the
    model's channel order, ``chunks`` int64 [R]: the chunk each row belongs to. ``seen`` counts all rows, ``weights``
    float32 [R] how many of them each sampled row stands for; None: all the same. ``gradients`` float32 [R]: how much
    the model's output depends on the layer's output for the row, where calibration measured it. ``multiplier`` float32
    [K]: the layer's input is ``rows`` times it by now, and ``low`` and ``high`` have it in them. ``sums``: of all rows,
    as they were, where the recipe asks for them.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    chunks: Tensor
    seen: int
    weights: Tensor | None = None
    gradients: Tensor | None = None
    multiplier: Tensor | None = None
    sums: RowSums | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """One linear as methods see it, on the device of its weight; input channels in ``[normal | outlier]`` order.

    ``weight`` float32 [N, K], ``low``/``high`` float32 [K] exact input extremes, ``rows`` float32 [R, K] sampled
    inputs, ``row_weights`` float32 [R] loss weights, ``split`` normal channels, ``seed`` of random choices. Without
    calibration data, which per-token schemes do not need, R is 0 and the extremes are zeros.

    ``counts`` float32 [R] is how many calibration rows each sampled one stands for, None: all the same; ``row_weights``
    have it in them. ``bias`` float32 [N] or None is there to measure outputs, and so is ``branch`` float32 [N, K] or
    None: what the model adds to the weight in floats (:class:`~fxq.passes.transforms.low_rank.LowRank`). ``moments``
    are of all calibration rows, weighed as ``row_weights`` weigh the sample; None: not known. ``cache`` is for what
    methods derive from the problem and others can use again; a changed copy of the problem has an empty one.
    """

    layer: str
    weight: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor
    row_weights: Tensor
    scheme: Scheme
    split: int
    seed: int
    counts: Tensor | None = None
    bias: Tensor | None = None
    branch: Tensor | None = None
    moments: Moments | None = None
    cache: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def groups(self) -> tuple[slice, ...]:
        """Channel slices, normal first."""
        return numerics.group_slices(self.weight.shape[1], self.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """The numbers and scales chosen for one linear, channels in ``[normal | outlier]`` order.

    ``weight`` int8 or float8 [N, K], ``weight_scale`` float32 [G, N], ``input_scale`` float32 [G], ``input_zero_point``
    int32 [G]; both None where the scheme measures input scales per token, the latter of float8 too. ``bias_shift``
    float32 [N] is added to the layer's bias, None: nothing. ``multiplier`` int8 [N, K / 32], 1..15: what the integers
    of a ``weight_group`` were multiplied by in ``weight``; None without groups.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    bias_shift: Tensor | None = None
    multiplier: Tensor | None = None


@runtime_checkable
class Method(Protocol):
    """Turns a problem and the update of the method before it into a better update; a dataclass of its options.

    An attribute ``formats`` of the class names the formats that it chooses numbers in; without one it is integers alone
    (:func:`chooses`).
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose integers and scales; ``update`` is None for the first method of a recipe."""
        ...


def is_method(value: object) -> TypeGuard[Method]:
    """Whether a value is a method, and not the class of one."""
    return isinstance(value, Method) and not isinstance(value, type)


def chooses(method: Method, scheme: Scheme) -> bool:
    """Whether a method chooses numbers of a scheme's format, or in its groups."""
    return scheme.numbers in getattr(type(method), "formats", (INTEGER,))


def refuse_format(layer: str, scheme: Scheme, methods: Sequence[Method]) -> None:
    """Refuse a layer whose format the methods of a recipe do not choose numbers in.

    Layers with ``reconstruct`` off are left to those methods that do.

    Raises:
        RecipeError: naming the layer, the methods and what would do.
    """
    others = [type(method).__name__ for method in methods if not chooses(method, scheme)]
    if others and (scheme.reconstruct or len(others) == len(methods)):
        chosen = f"layer {layer}: {', '.join(others)} choose{'s' * (len(others) == 1)} integers"
        if scheme.weight_group:
            raise RecipeError(
                f"{chosen} of one scale, and its weight_group is {scheme.weight_group}. Name methods that know groups, "
                "as those of the presets, or set weight_group to 0"
            )
        raise RecipeError(
            f"{chosen}, and its format is {scheme.format}. Name RangeSearch or MinMax alone, as the presets fp8 do, or "
            "have reconstruct = false in its scheme beside one of them"
        )


def check_methods(methods: Iterable[object]) -> None:
    """Refuse what is no method.

    Raises:
        RecipeError: telling what is.
    """
    for method in methods:
        if not is_method(method):
            raise RecipeError(
                f"method {method!r}: expected an instance of a dataclass with apply(problem, update), as RangeSearch()"
            )


@runtime_checkable
class LearningMethod(Method, Protocol):
    """A method that learns from calibration rows, step by step, where a scheme allows it (``reconstruct``).

    What a plan of a quantization counts: the time of a step, on a problem of ``rows``, times ``iterations``.
    """

    @property
    def iterations(self) -> int:
        """Steps."""

    @property
    def rows(self) -> int:
        """Calibration rows of a step."""


@runtime_checkable
class SolvingMethod(Method, Protocol):
    """A method that learns from all rows at once (``reconstruct``), by linear algebra of a known size."""

    def operations(self, rows: int, width: int, outputs: int) -> float:
        """Floating-point operations of a layer [outputs, width] with that many calibration rows, at most."""
