"""Rollout of Self-Forcing and its chunk-wise relatives on :class:`~fxq.models.causal_wan.CausalWan`.

The official few-step loop (arXiv 2506.08009): per chunk a few denoising calls with renoising between them,
then one context call that writes clean keys and values. Causal-Forcing's frame-wise chunks and its own step
list for the first chunk are settings of the same loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import Dim

from fxq.cache.absorb import Absorption, Watch
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Layout, Memories
from fxq.cache.tables import same_tables, sampled
from fxq.calibration.rollout import Call, Condition, Draws, Kind, OnCall, Rollout, Span, State
from fxq.models.causal_wan import CausalWan, CausalWanBlock, rope_tables
from fxq.models.schedule import FlowSchedule
from fxq.models.wan_rotary import WanRotary
from fxq.passes.absorb_cache import observed
from fxq.passes.match.cache_inputs import FEW, MAPS, Added, Prefix, cache_inputs, graph_of, held_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The few-step loop: what is sampled, in which chunks and steps, with which cache policy.

    ``steps`` are nominal (1000, 750, ...) and warped onto the shifted grid unless ``warp`` is off;
    ``first_chunk_steps`` replaces them in the first generated chunk.
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    first_chunk_steps: tuple[float, ...] | None = None
    warp: bool = True
    frames_per_chunk: int = 3
    context_noise: float = 0.0
    cache: CachePolicy = dataclasses.field(default_factory=CachePolicy)
    schedule: FlowSchedule = FlowSchedule()

    def __post_init__(self) -> None:
        for name in ("steps", "first_chunk_steps"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.schedule, dict):
            object.__setattr__(self, "schedule", FlowSchedule(**self.schedule))
        if not self.steps:
            raise ValueError("steps is empty: a chunk needs at least one denoising step")
        self.cache.check(self.frames_per_chunk)

    def timesteps(self, first: bool) -> tuple[float, ...]:
        """Timesteps of a chunk; ``first`` for the first generated one."""
        steps = self.first_chunk_steps if first and self.first_chunk_steps is not None else self.steps
        return self.schedule.warp(steps) if self.warp else tuple(float(s) for s in steps)


@dataclasses.dataclass(frozen=True)
class SelfForcingState(State):
    """``cache`` of the frames so far; per layer ``cross_k``/``cross_v`` [B, L, heads, head_dim] of the prompt."""

    cache: Cache
    cross_k: tuple[Tensor, ...]
    cross_v: tuple[Tensor, ...]
    calls: int
    absorption: Absorption | None = None


class SelfForcingRollout(Rollout):
    """Chunk-wise few-step rollout with a K/V cache.

    A condition has ``prompt_embeds`` [B, L, text_dim] and optionally ``initial_latent`` [B, F0, C, H, W], frames
    that are given; F0 must be a whole number of chunks. Draws hold noise for the generated frames only.

    Args:
        model: the denoiser.
        batches: (condition, draws) pairs.
        sampler: the loop's settings.
        any_size: capture a graph for frames of any height and width, on small ones; else for those of the draws.
        cache_tables: what the codecs of the cache learned from calibration, see :func:`fxq.cache.choose.cache_tables`;
            None: what the module that runs holds of them.
        absorb_priors: per layer, the map of calibration videos that those of a video are drawn towards; see
            :class:`fxq.cache.absorb.Absorption`.
    """

    def __init__(
        self,
        model: CausalWan,
        batches: Sequence[tuple[Condition, Draws]],
        sampler: SamplerConfig | None = None,
        *,
        any_size: bool = False,
        cache_tables: Memories | None = None,
        absorb_priors: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(model, batches)
        self.model = model
        self.sampler = sampler or SamplerConfig()
        self.any_size = any_size
        self.cache_tables = cache_tables
        self.absorb_priors = tuple(absorb_priors)
        self.committing: Callable[[Cache], Cache] = Cache.commit
        """What encodes spans that have grown old enough, once a chunk; measures time it."""
        self._observed: tuple[fx.GraphModule, fx.GraphModule] | None = None

    def _given(self, condition: Condition) -> int:
        latent = condition.get("initial_latent")
        return 0 if latent is None else latent.shape[1]

    def units(self, condition: Condition, draws: Draws) -> int:
        """Chunks of the video, given ones included."""
        size = self.sampler.frames_per_chunk
        frames = self._given(condition) + draws.shape[0]
        if frames % size or draws.shape[0] % size:
            raise ValueError(
                f"{self._given(condition)} given and {draws.shape[0]} generated frames are not whole chunks of {size}"
            )
        return frames // size

    def begin(self, condition: Condition, draws: Draws) -> SelfForcingState:
        """An empty cache.

        Raises:
            ValueError: when the prompt's embedding or the cache policy does not fit the model.
        """
        config, batch = self.model.config, draws.batch
        prompt = condition["prompt_embeds"]
        if prompt.ndim != 3 or prompt.shape[0] != batch or prompt.shape[2] != config.text_dim:
            raise ValueError(
                f"prompt_embeds has shape {tuple(prompt.shape)}, expected [{batch}, tokens, {config.text_dim}]"
            )
        if prompt.shape[1] > config.text_len:
            raise ValueError(f"prompt_embeds has {prompt.shape[1]} tokens, the model takes at most {config.text_len}")
        weight = self.model.patch_embedding.weight
        empty = weight.new_zeros(batch, 0, config.num_heads, config.head_dim)
        none = (empty,) * config.num_layers
        latents = weight.new_zeros(batch, 0, *draws.shape[1:])
        _, rows, columns = config.patch_size
        rotary = WanRotary(config.head_dim, draws.shape[2] // rows, draws.shape[3] // columns)
        layout = Layout(rotary.tokens, self.sampler.frames_per_chunk)
        frames = self._given(condition) + draws.shape[0]
        cache = Cache.empty(self.sampler.cache, layout, rotary, none, self._tables(), frames)
        settings, absorption = self.sampler.cache.absorb, None
        if settings is not None:
            absorption = Absorption.begin(settings, config.num_layers, config.num_heads, empty, self.absorb_priors)
        return SelfForcingState(condition, draws, 0, latents, cache, none, none, 0, absorption)

    def _tables(self) -> Memories | None:
        """Those that the running module holds, else the rollout's own.

        Raises:
            ValueError: when they differ: the module would decode by others than spans are encoded by.
        """
        config = self.model.config
        heads = config.num_heads, config.head_dim
        held = held_tables(self._running, self.sampler.cache, config.num_layers, heads)
        if held is None or self.cache_tables is None:
            return held or self.cache_tables
        if not same_tables(held, self.cache_tables):
            raise ValueError("the module holds other tables of its codecs than cache_tables: leave cache_tables None")
        return held

    def cached_tokens(self, condition: Condition, draws: Draws, policy: CachePolicy, most: int) -> dict[str, Tensor]:
        """Tokens of every chunk, from a cache without codecs."""
        sampler, units = self.sampler, self.units(condition, draws)
        parts: list[dict[str, Tensor]] = []
        self.sampler = dataclasses.replace(sampler, cache=policy.exact)
        try:
            state = self.begin(condition, draws)
            for _ in range(units):
                state = self.advance(state)
                parts.append(sampled(state.cache, policy, -(-most // units)))
        finally:
            self.sampler = sampler
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def fork(self, state: State) -> SelfForcingState:
        """An independent continuation; the state's cache is then never written over."""
        state = cast(SelfForcingState, state)
        return dataclasses.replace(state, cache=state.cache.fork())

    def advance(self, state: State, on_call: OnCall | None = None) -> SelfForcingState:
        """One chunk: denoising calls, then the context call; a given chunk is one context-like call."""
        return self._advance(cast(SelfForcingState, state), on_call, None)

    def take(self, state: State, latents: Tensor, on_call: OnCall | None = None) -> SelfForcingState:
        """One chunk whose clean latents [B, frames, C, H, W] come from elsewhere: the context call alone.

        With the latents that :meth:`advance` would have made the state after it is the same.
        """
        return self._advance(cast(SelfForcingState, state), on_call, latents)

    def _advance(self, state: SelfForcingState, on_call: OnCall | None, taken: Tensor | None) -> SelfForcingState:
        state = dataclasses.replace(state, cache=state.cache.evict())
        prefix, watch = self._prefix(state), self._watch(state)
        if watch is None:
            return self._chunk(state, prefix, on_call, taken)
        with self.using(watch):
            after = self._chunk(state, prefix, on_call, taken)
        absorption = watch.absorption.leaving(state.next_unit)
        if absorption.converted:
            absorption = absorption.standing_for(after.cache.history)
        cache = after.cache.closing(absorption.converted) if absorption.converted else after.cache
        return dataclasses.replace(after, absorption=absorption, cache=cache)

    def _chunk(
        self, state: SelfForcingState, prefix: tuple[Prefix, Added], on_call: OnCall | None, taken: Tensor | None
    ) -> SelfForcingState:
        sampler, weight = self.sampler, self.model.patch_embedding.weight
        size, unit = sampler.frames_per_chunk, state.next_unit
        given = self._given(state.condition) // size
        lo, hi = unit * size, (unit + 1) * size
        if unit < given:
            latents = state.condition["initial_latent"][:, lo:hi].to(weight.device, weight.dtype)
            state = self._write(state, prefix, latents, "given", Span(unit, 0, (lo, hi), 0.0), on_call)
        elif taken is not None:
            latents = taken.to(weight.device, weight.dtype)
            span = Span(unit, len(sampler.timesteps(unit == given)), (lo, hi), sampler.context_noise)
            state = self._write(state, prefix, latents, "context", span, on_call)
        else:
            first = unit == given
            offset = (unit - given) * size
            x = state.draws.noise[:, offset : offset + size].to(weight.device, weight.dtype)
            timesteps = sampler.timesteps(first)
            for step, timestep in enumerate(timesteps):
                span = Span(unit, step, (lo, hi), timestep)
                output, state = self._call(state, prefix, x, "denoise", span, on_call)[:2]  # the keys are not held
                t = torch.full(x.shape[:2], timestep, dtype=torch.float32, device=x.device)
                latents = sampler.schedule.x0(x, output, t)
                if step + 1 < len(timesteps):
                    noise = state.draws.renoise(unit - given, step, size).to(weight.device, weight.dtype)
                    following = torch.full(x.shape[:2], timesteps[step + 1], dtype=torch.float32, device=x.device)
                    x = sampler.schedule.renoise(latents, noise, following)
            span = Span(unit, len(timesteps), (lo, hi), sampler.context_noise)
            state = self._write(state, prefix, latents, "context", span, on_call)
        return dataclasses.replace(state, next_unit=unit + 1, latents=torch.cat((state.latents, latents), dim=1))

    def _prefix(self, state: SelfForcingState) -> tuple[Prefix, Added]:
        """What the running module takes of a state's cache; ValueError where it does not fit."""
        added: dict[str, object] = {}
        if state.absorption is not None:
            added[FEW if state.absorption.settings.tokens else MAPS] = state.absorption.inputs
        return cache_inputs(self._running, state.cache, added)

    def _watch(self, state: SelfForcingState) -> Watch | None:
        """The running module with what its layers' maps are fitted to, in a warm-up with something to see."""
        absorption, cache, graph = state.absorption, state.cache, graph_of(self._running)
        if absorption is None or not absorption.observes(state.next_unit, cache.kept > cache.sink):
            return None
        if graph is None:
            raise ValueError(
                f"chunk {state.next_unit} is of the warm-up, in which maps are fitted, and the module that runs has no "
                "graph that shows what to: run the bundle's module until then, and the compiled program afterwards"
            )
        if self._observed is None or self._observed[0] is not graph:
            self._observed = graph, observed(graph, cache.policy.sink * cache.layout.tokens)
        weights = [cast(CausalWanBlock, block).self_attn.o.weight.T for block in self.model.blocks]
        return Watch(self._observed[1], absorption.entering(state.next_unit), weights)

    def _call(
        self,
        state: SelfForcingState,
        prefix: tuple[Prefix, Added],
        x: Tensor,
        kind: Kind,
        span: Span,
        on_call: OnCall | None,
    ) -> tuple[Tensor, SelfForcingState, tuple[list[Tensor], list[Tensor]]]:
        config, weight = self.model.config, self.model.patch_embedding.weight
        prompt = state.condition["prompt_embeds"].to(weight.device, weight.dtype)
        if state.calls:
            prompt = prompt[:, :0]
        elif prompt.shape[1] < config.text_len:
            prompt = torch.nn.functional.pad(prompt, (0, 0, 0, config.text_len - prompt.shape[1]))
        _, ph, pw = config.patch_size
        cos, sin = rope_tables(config.head_dim, x.shape[1], x.shape[3] // ph, x.shape[4] // pw, span.frames[0])
        output, k, v, cross_k, cross_v = self.call(
            Call(state.calls, kind, (span,), state.cache.layout.tokens),
            x,
            torch.full(x.shape[:2], span.timestep, dtype=torch.float32, device=x.device),
            prompt,
            list(state.cross_k),
            list(state.cross_v),
            *prefix[0],
            cos.to(x.device),
            sin.to(x.device),
            *prefix[1],
            on_call=on_call,
        )
        after = dataclasses.replace(state, cross_k=tuple(cross_k), cross_v=tuple(cross_v), calls=state.calls + 1)
        return output, after, (list(k), list(v))

    def _write(
        self,
        state: SelfForcingState,
        prefix: tuple[Prefix, Added],
        latents: Tensor,
        kind: Kind,
        span: Span,
        on_call: OnCall | None,
    ) -> SelfForcingState:
        _, state, new = self._call(state, prefix, latents, kind, span, on_call)
        return dataclasses.replace(state, cache=self.committing(state.cache.append(*new)))

    def example_call(self) -> tuple[tuple[object, ...], object]:
        """A call in the middle of a video; batch, text, text-cache and prefix lengths are dynamic.

        So are height and width with ``any_size``.
        """
        config, weight, draws = self.model.config, self.model.patch_embedding.weight, self.batches[0][1]
        generator = torch.Generator().manual_seed(0)
        frames, (_, channels, height, width) = self.sampler.frames_per_chunk, draws.shape
        _, ph, pw = config.patch_size
        if self.any_size:
            height, width = 4 * ph, 6 * pw

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)

        def cache(tokens: int) -> list[Tensor]:
            return [normal(2, tokens, config.num_heads, config.head_dim) for _ in range(config.num_layers)]

        x = normal(2, frames, channels, height, width)
        t = torch.full((2, frames), 500.0, dtype=torch.float32, device=weight.device)
        cos, sin = (r.to(weight.device) for r in rope_tables(config.head_dim, frames, height // ph, width // pw, 3))
        args = (x, t, normal(2, 4, config.text_dim), cache(3), cache(3), cache(6), cache(6), cos, sin)
        auto, none = Dim.AUTO, None
        cached = [{0: auto, 1: auto} for _ in range(config.num_layers)]
        size = {3: auto, 4: auto} if self.any_size else {}
        table = {0: auto} if self.any_size else none
        text = {0: auto, 1: auto}
        return args, ({0: auto} | size, {0: auto}, text, cached, cached, cached, cached, table, table)
