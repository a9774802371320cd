"""What a tiny configuration of a diffusers transformer is: its class, constructor arguments and inputs, all as data."""

import dataclasses
import importlib
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Normal:
    """float32 [shape] of normal numbers."""

    shape: tuple[int, ...]

    def draw(self, generator):
        return torch.randn(self.shape, generator=generator)


@dataclasses.dataclass(frozen=True)
class Whole:
    """int64 [shape] of numbers in ``0 .. below - 1``."""

    below: int
    shape: tuple[int, ...]

    def draw(self, generator):
        return torch.randint(self.below, self.shape, generator=generator)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """float32 [shape] of numbers in [0, scale)."""

    shape: tuple[int, ...]
    scale: float = 1.0

    def draw(self, generator):
        return torch.rand(self.shape, generator=generator) * self.scale


def normal(*shape):
    return Normal(shape)


def whole(below, *shape):
    return Whole(below, shape)


def uniform(*shape, scale=1.0):
    return Uniform(shape, scale)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A class of diffusers by name, how to build it small, and how to call it.

    ``inputs`` are keyword arguments; :class:`Normal`, :class:`Whole` and :class:`Uniform` in them stand for tensors
    that are drawn anew for each batch, everything else is passed as it is. ``sqnr`` is the least output SQNR in dB at
    W8A8; ``refused`` a regular expression of the error, for models that cannot be captured, ``why`` its cause in words.
    """

    model: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    variant: str = ""
    sqnr: float = 20.0
    refused: str = ""
    why: str = ""

    @property
    def name(self) -> str:
        """Class and variant."""
        return f"{self.model} ({self.variant})" if self.variant else self.model

    def build(self, seed=0):
        """The model in eval mode; parameters that are constant at the start (heads, gates, norms) are made random."""
        torch.manual_seed(seed)
        model = getattr(importlib.import_module("diffusers.models.transformers"), self.model, None)
        if model is None:
            model = getattr(importlib.import_module("diffusers"), self.model)
        return randomise(model(**self.config).eval().requires_grad_(False))

    def batch(self, seed):
        """Keyword arguments of one call."""
        generator = torch.Generator().manual_seed(seed)
        random = (Normal, Whole, Uniform)
        return pytree.tree_map(lambda v: v.draw(generator) if isinstance(v, random) else v, self.inputs)


def randomise(model):
    """Add noise to every constant parameter: zero-initialised heads and gates would hide what is behind them."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
    return model


def linears(model):
    """Every nn.Linear by each of its names."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
