"""The adapter protocol: how fxq drives an autoregressive video model without knowing it.

A model family is one short file with a :class:`Rollout`. The adapter owns sampling, cache and randomness;
the library owns which module runs and who observes it. Calls publish themselves in a context variable, so
observers know chunk and step while nothing inside the model does.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxq.cache.policy import CachePolicy


@dataclasses.dataclass(frozen=True)
class Span:
    """One contiguous group of frames at one noise level inside a call.

    ``step`` counts the denoising steps of the chunk; a context call has the step after the last one.
    """

    chunk: int
    step: int
    frames: tuple[int, int]
    timestep: float


Kind = Literal["denoise", "context", "given", "recache"]
"""What a call is for: a prediction, clean keys and values of a chunk, the same of given frames or of earlier ones."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One denoiser call; ``branch`` is cond or uncond.

    Raises:
        ValueError: when ``kind`` is none of :data:`Kind`: measures would pass over the call in silence.
    """

    index: int
    kind: Kind
    spans: tuple[Span, ...]
    tokens_per_frame: int
    branch: str = "cond"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"call {self.index} is of kind {self.kind!r}: expected one of {', '.join(get_args(Kind))}")

    @property
    def chunk(self) -> int:
        """Chunk of the call's last span, the one whose cache or latents the call produces."""
        return self.spans[-1].chunk


_CURRENT: contextvars.ContextVar[Call | None] = contextvars.ContextVar("fxq_current_call", default=None)


def current_call() -> Call | None:
    """The denoiser call being run, or None outside a rollout."""
    return _CURRENT.get()


@contextlib.contextmanager
def publishing(call: Call) -> Iterator[None]:
    """Make ``call`` the current one; adapters wrap every denoiser call in it."""
    token = _CURRENT.set(call)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Draws:
    """The random numbers of a batch of rollouts, a pure function of (seed, chunk, step).

    One seed per sample, so a sample's video does not depend on the batch it is generated in, and a forked
    or skipped chunk does not shift later draws.

    Args:
        seeds: one integer per sample.
        shape: latent shape of one sample, (F, C, H, W).
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int, int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.shape = tuple(shape)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.seeds)

    def _normal(self, shape: Sequence[int], *key: int) -> Tensor:
        samples = []
        for seed in self.seeds:
            mixed = seed
            for part in key:
                mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
            generator = torch.Generator().manual_seed(mixed)
            samples.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
        return torch.stack(samples)

    @property
    def noise(self) -> Tensor:
        """Initial noise, float32 [B, F, C, H, W]."""
        return self._normal(self.shape, 0)

    def renoise(self, chunk: int, step: int, frames: int) -> Tensor:
        """Fresh noise for the renoising after ``step`` of ``chunk``, float32 [B, frames, C, H, W]."""
        return self._normal((frames, *self.shape[1:]), 1 + chunk, step)


Condition = Mapping[str, Tensor]
OnCall = Callable[[Call, Any], None]


@dataclasses.dataclass(frozen=True)
class State:
    """Where a rollout stands. Adapters extend it; tensors inside are never written in place."""

    condition: Condition
    draws: Draws
    next_unit: int
    latents: Tensor


class Rollout(ABC):
    """An autoregressive video model bound to prompts and noise.

    Args:
        denoiser: the module whose linears are quantized.
        batches: the rollouts to drive: (condition tensors, draws) pairs of equal batch size.

    Raises:
        ValueError: when there is no batch.
    """

    def __init__(self, denoiser: nn.Module, batches: Sequence[tuple[Condition, Draws]]) -> None:
        if not batches:
            raise ValueError("the rollout has no (condition, draws) batch: calibration needs at least one prompt")
        self.denoiser = denoiser
        self.batches = tuple(batches)
        self._running: Callable[..., object] = denoiser

    @contextlib.contextmanager
    def using(self, module: Callable[..., object]) -> Iterator[None]:
        """Run calls through another module of the same signature (quantized, exported)."""
        before, self._running = self._running, module
        try:
            yield
        finally:
            self._running = before

    def call(self, call: Call, *args: object, on_call: OnCall | None = None) -> Any:
        """Run the denoiser once, published as ``call``; ``on_call`` sees its output."""
        with publishing(call), torch.no_grad():
            output = self._running(*args)
        if on_call is not None:
            on_call(call, output)
        return output

    @abstractmethod
    def units(self, condition: Condition, draws: Draws) -> int:
        """Number of resumable steps of a video (chunks, or windows for rolling models)."""

    @abstractmethod
    def begin(self, condition: Condition, draws: Draws) -> State:
        """State before the first unit: empty caches."""

    @abstractmethod
    def advance(self, state: State, on_call: OnCall | None = None) -> State:
        """Run every call of the next unit, context call included, and return the state after it."""

    def fork(self, state: State) -> State:
        """An independent continuation. Free here: states are immutable and share tensors."""
        return dataclasses.replace(state)

    def rollout(
        self, condition: Condition, draws: Draws, on_call: OnCall | None = None, upto: int | None = None
    ) -> Tensor:
        """Generate latents [B, F, C, H, W], all units or the first ``upto``."""
        state = self.begin(condition, draws)
        for _ in range(self.units(condition, draws) if upto is None else upto):
            state = self.advance(state, on_call)
        return state.latents

    def cached_tokens(self, condition: Condition, draws: Draws, policy: CachePolicy, most: int) -> dict[str, Tensor]:
        """Tokens of a video's cache for the codecs of a policy that learn from calibration.

        Args:
            condition: of the rollout.
            draws: of the rollout.
            policy: what is kept, and the codecs.
            most: about how many tokens of each layer to give, over the whole video.

        Returns:
            As :func:`fxq.cache.tables.sampled`.

        Raises:
            NotImplementedError: for a loop without an fxq cache.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no fxq cache, so its codecs have nothing to learn from")

    @abstractmethod
    def example_call(self) -> tuple[tuple[object, ...], object]:
        """(args, dynamic_shapes) for ``torch.export``: a call whose every dynamic size is at least 2."""
