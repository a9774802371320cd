"""Options that say how a rollout keeps its keys and values, and the policy they come to."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Literal

import typer

from fxq.cache.absorb import Absorb
from fxq.cache.choose import choose, rivals
from fxq.cache.codecs.int8_attention import Int8Attention
from fxq.cache.codecs.klt import FIT_TOKENS
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Memories
from fxq.cache.tables import learned
from fxq.calibration.rollout import Rollout
from fxq.cli.options.common import expanding
from fxq.cli.options.models import AdapterError
from fxq.models.self_forcing import SelfForcingRollout
from fxq.runtime.messages import did_you_mean

ReportOption = Annotated[
    pathlib.Path | None,
    typer.Option("--report", help="HTML page to write: memory of the cache, drift and cost of encoding by chunk."),
]

AUTO_BITS = 3.0
"""Stored bits per number of ``--kv auto`` without a budget."""


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """What was asked for; None and 0 where nothing was: the model's own."""

    kv: str | None = None
    kv_bits: float | None = None
    span: int | None = None
    positions: Literal["absolute", "relative"] | None = None
    window: int | None = None
    sink: int | None = None
    absorb: float | None = None

    @property
    def given(self) -> str:
        """The options that were given, as on the command line; empty where none was."""
        names = (field.name for field in dataclasses.fields(self))
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None)

    def policy(self, rollout: Rollout, calibration: Rollout | None, chunks: int | None = None) -> CachePolicy:
        """The rollout's own policy with what was asked for in its place.

        Args:
            rollout: whose cache it is; not changed.
            calibration: what ``--kv auto`` chooses codecs on, which is run; None: nothing can be.
            chunks: length of the videos meant, over which what is stored once is spread; None: that of calibration.

        Raises:
            AdapterError: for a rollout without such a cache, an unknown codec, or settings that exclude each other.
        """
        if not isinstance(rollout, SelfForcingRollout):
            raise AdapterError(f"{self.given}: {type(rollout).__name__} has no fxq cache, leave out these options")
        try:
            return self._policy(rollout, calibration, chunks)
        except AdapterError:
            raise
        except ValueError as error:
            raise AdapterError(f"the cache cannot be so: {error}") from error

    def _policy(self, rollout: SelfForcingRollout, calibration: Rollout | None, chunks: int | None) -> CachePolicy:
        if self.kv_bits is not None and self.kv != "auto":
            raise AdapterError("--kv-bits is the budget of --kv auto; other codecs have their bits in their names")
        changed = {name: getattr(self, name) for name in ("span", "positions", "window", "sink")}
        policy = dataclasses.replace(
            rollout.sampler.cache, **{name: value for name, value in changed.items() if value is not None}
        )
        if self.kv is not None and self.span is None:
            policy = dataclasses.replace(policy, span=min(policy.span, 2))
        if self.absorb is not None:
            policy = dataclasses.replace(policy, absorb=Absorb(ratio=self.absorb))
        layout = rollout.begin(*rollout.batches[0]).cache.layout
        if self.kv is not None:
            compared = rivals(rollout.model.config.head_dim, policy.span * layout.chunk * layout.tokens)
            known = compared | {"int8-attention": Int8Attention()}
            if self.kv == "auto":
                if not isinstance(calibration, SelfForcingRollout):
                    raise AdapterError(
                        "--kv auto looks at caches of calibration videos: pass --prompts, or name a codec"
                    )
                caches = exact_caches(calibration, policy.span)
                spread = chunks or max(calibration.units(*batch) for batch in calibration.batches)
                policy, _ = choose(compared, caches, self.kv_bits or AUTO_BITS, policy, max(spread, policy.span))
            elif self.kv in known:
                policy = dataclasses.replace(policy, keys=known[self.kv], values=known[self.kv])
            else:
                hint = did_you_mean(self.kv, known) or "unknown"
                raise AdapterError(f"--kv {self.kv}: {hint} There are auto, {', '.join(known)}")
        policy.check(layout.chunk)
        return policy


def _options(
    kv: Annotated[
        str | None,
        typer.Option(
            help="Store old keys and values so: klt1, klt1-model, qvg, kivi2, int8, ...; `fxq cache` lists them."
        ),
    ] = None,
    kv_bits: Annotated[
        float | None, typer.Option(min=0.01, help="With --kv auto: stored bits per number; a codec for each layer.")
    ] = None,
    span: Annotated[int | None, typer.Option(min=1, help="Chunks that are encoded together; 2 with --kv.")] = None,
    positions: Annotated[
        Literal["absolute", "relative"] | None,
        typer.Option(help="Of cached keys; relative ones suit any length and need a --window."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=-1, help="Attention span in frames; -1: all of the video. The model's by default.")
    ] = None,
    sink: Annotated[
        int | None, typer.Option(min=0, help="First frames that are never evicted. The model's by default.")
    ] = None,
    absorb: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Share of the layers that may forget their history, made up for by a map."
        ),
    ] = None,
) -> CacheOptions:
    return CacheOptions(kv, kv_bits, span, positions, window, sink, absorb)


with_cache_options = expanding("kept", _options)
"""The command with the options of a cache in the place of its parameter ``kept``."""


def tables_for(policy: CachePolicy, calibration: SelfForcingRollout) -> Memories | None:
    """What the codecs of a policy learn from a rollout's videos, which are made; None where they need nothing."""
    if not policy.needs_tables:
        return None
    most = -(-FIT_TOKENS // len(calibration.batches))
    samples = [calibration.cached_tokens(*batch, policy, most) for batch in calibration.batches]
    return learned(policy, samples, calibration.model.config.num_layers)


def exact_caches(rollout: SelfForcingRollout, chunks: int) -> list[Cache]:
    """Caches of every batch after some chunks, with nothing encoded or evicted.

    Raises:
        AdapterError: when videos are shorter.
    """
    sampler, found = rollout.sampler, []
    rollout.sampler = dataclasses.replace(sampler, cache=CachePolicy())
    try:
        for condition, draws in rollout.batches:
            if rollout.units(condition, draws) < chunks:
                raise AdapterError(
                    f"videos of {rollout.units(condition, draws)} chunks have no span of {chunks}: pass a smaller "
                    "--span, or more --frames"
                )
            state = rollout.begin(condition, draws)
            for _ in range(chunks):
                state = rollout.advance(state)
            found.append(state.cache)
    finally:
        rollout.sampler = sampler
    return found
