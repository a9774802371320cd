"""Which codec for which layer's keys and values: measured on caches of the model's own rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, shape_of
from fxq.cache.codecs.fp8 import Float8
from fxq.cache.codecs.kivi import Kivi
from fxq.cache.codecs.klt import Klt
from fxq.cache.codecs.low_rank import LowRank
from fxq.cache.codecs.prq import Prq
from fxq.cache.codecs.quarot import QuaRot
from fxq.cache.codecs.rtn import PerToken
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Memories

KINDS: tuple[Kind, ...] = ("keys", "values")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One codec on one layer's keys or values.

    ``bits`` are stored per element at the length that was asked for, ``sqnr`` in dB is the mean over videos.
    """

    codec: str
    bits: float
    sqnr: float

    @property
    def noise(self) -> float:
        """Energy of the error as a share of the signal's."""
        return float(10 ** (-self.sqnr / 10))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one layer's keys or values, what else was tried, and why.

    ``unfit`` says of codecs that were not tried why they do not fit the layer.
    """

    kind: Kind
    layer: int
    chosen: Trial
    trials: tuple[Trial, ...]
    reason: str
    unfit: Mapping[str, str] = dataclasses.field(default_factory=dict)


def rivals(head_dim: int, span: int) -> dict[str, Codec]:
    """The codecs that a comparison begins with, by short names, with settings that suit heads and spans of these sizes.

    Args:
        head_dim: channels of a head.
        span: tokens of a span; there is one centroid for 16 tokens at least.

    Those of ``-model`` and ``-joint`` have their basis from calibration, the latter one of all heads together.
    """
    block, small = _divisor(head_dim, 64), _divisor(head_dim, 16)
    centroids = max(2, min(256, 2 ** int(math.log2(max(2, span / 16)))))
    found: dict[str, Codec] = {
        "rtn2": PerToken(2, small, asymmetric=True, scale_dtype="bfloat16"),
        "rtn4": PerToken(4, block, scale_dtype="bfloat16"),
        "kivi2": Kivi(2, 0, block),
        "kivi4": Kivi(4, 0, block),
        "qvg": Prq(1, centroids, 2, block, scale_dtype="bfloat16"),
        "qvg_asymmetric": Prq(1, centroids, 2, block, asymmetric=True, scale_dtype="bfloat16"),
        "qvg_pro": Prq(4, centroids, 2, small, scale_dtype="bfloat16"),
        "qvg_int4": Prq(1, centroids, 4, block, scale_dtype="bfloat16"),
        "low_rank": LowRank(min(4, head_dim), 2, block),
        "klt0.5": Klt(0.5),
        "klt1": Klt(1.0),
        "klt2": Klt(2.0),
        "klt3": Klt(3.0),
        "klt0.5-model": Klt(0.5, fit="model"),
        "klt1-model": Klt(1.0, fit="model"),
        "klt2-model": Klt(2.0, fit="model"),
        "klt1-joint": Klt(1.0, joint=True, fit="model"),
        "fp8": Float8(),
        "int8": PerToken(8, block, scale_dtype="bfloat16"),
    }
    if not head_dim & (head_dim - 1):
        found["quarot2"] = QuaRot(2, block, scale_dtype="bfloat16")
        found["quarot4"] = QuaRot(4, block, scale_dtype="bfloat16")
    return found


def _divisor(number: int, most: int) -> int:
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)


def components(x: Tensor, share: float = 0.99) -> float:
    """How many principal components of a head hold a share of its tokens' energy about their mean.

    Args:
        x: float [B, T, heads, head_dim].
        share: of the energy.

    Returns:
        The mean over videos and heads.
    """
    heads = x.double().transpose(1, 2)
    centred = heads - heads.mean(dim=2, keepdim=True)
    energy = torch.linalg.eigvalsh(centred.transpose(-1, -2) @ centred).flip(-1).clamp_min(0).cumsum(-1)
    return float((energy < share * energy[..., -1:]).sum(-1).double().add(1).mean())


def cache_tables(policy: CachePolicy, caches: Sequence[Cache]) -> Memories:
    """What codecs that lie with the model learn from exact caches of calibration rollouts; empty for all others.

    Args:
        policy: whose codecs are fitted.
        caches: of rollouts without codec and window, all of their videos count.
    """

    def fitted(kind: Kind) -> list[Memory]:
        found: list[Memory] = []
        for layer in range(len(caches[0].keys)):
            codec = policy.codec(kind, layer)
            tokens = [cache.exact(kind, layer).flatten(0, 1) for cache in caches] if codec else []
            found.append({} if codec is None else codec.learned(torch.cat(tokens)))
        return found

    return fitted("keys"), fitted("values")


def try_codec(name: str, codec: Codec, x: Tensor, kind: Kind, span: int, spans: int, memory: Memory) -> Trial:
    """Encode the whole spans of exact tokens one after the other.

    Args:
        name: of the codec, for reports.
        codec: the codec.
        x: float [B, T, heads, head_dim].
        kind: of ``x``.
        span: tokens of a span.
        spans: length of a video in spans, for what is stored once.
        memory: what the codec begins with.

    Raises:
        ValueError: when the codec does not fit the tokens' shape or range, with what would.
    """
    shape = dataclasses.replace(shape_of(x), span=span)
    codec.fields(shape, kind)
    whole, parts, noise = x.shape[1] // span, [], torch.zeros(len(x), dtype=torch.float64)
    for i in range(whole):
        part = x[:, i * span : (i + 1) * span].float()
        record, memory = codec.encode(part, kind, memory)
        noise += (codec.decode(record, kind) - part).double().square().flatten(1).sum(1)
        parts.append(part.double().square().flatten(1).sum(1))
    energy = torch.stack(parts).sum(0)
    ratio = (energy / noise.clamp_min(torch.finfo(torch.float64).tiny)).log10() * 10
    return Trial(name, codec.bits_per_element(shape, kind, spans), float(ratio.mean()))


def _tried(name: str, codec: Codec, x: Tensor, kind: Kind, span: int, spans: int) -> Trial:
    """As :func:`try_codec`; a codec that learns from calibration learns from one half of the videos for the other."""
    if not codec.needs_tables:
        return try_codec(name, codec, x, kind, span, spans, {})
    if len(x) < 2:
        raise ValueError("it learns from some videos and is tried on others: two or more are needed")
    halves = x[: len(x) // 2], x[len(x) // 2 :]
    parts = [
        try_codec(name, codec, part, kind, span, spans, codec.learned(other.flatten(0, 1)))
        for part, other in (halves, halves[::-1])
    ]
    mean = sum(len(half) * part.sqnr for half, part in zip(halves, parts, strict=True)) / len(x)
    return dataclasses.replace(parts[0], sqnr=mean)


def choose(
    candidates: Mapping[str, Codec], caches: Sequence[Cache], bits: float, policy: CachePolicy, chunks: int
) -> tuple[CachePolicy, tuple[Choice, ...]]:
    """The codecs whose errors, summed over layers, keys and values, are least at no more stored bits.

    Every layer begins with its cheapest codec; then whichever change lowers the error most per bit is made, as long as
    the mean stays within ``bits``.

    Args:
        candidates: codecs by the names that reports show.
        caches: exact caches of calibration rollouts.
        bits: stored bits per element, mean over layers, keys and values.
        policy: span and the rest; its codecs are replaced.
        chunks: length of the videos that are meant, over which what is stored once is spread.

    Returns:
        The policy with one codec per layer, and the choices.

    Raises:
        ValueError: when no codec fits, or the cheapest need more than ``bits``.
    """
    layout = caches[0].layout
    span = policy.span * layout.chunk * layout.tokens
    spans = max(1, chunks // policy.span)
    trials: dict[tuple[Kind, int], list[Trial]] = {}
    unfit: dict[tuple[Kind, int], dict[str, str]] = {}
    for kind in KINDS:
        for layer in range(len(caches[0].keys)):
            x = torch.cat([cache.exact(kind, layer) for cache in caches])
            if x.shape[1] < span:
                raise ValueError(f"the caches hold {x.shape[1]} tokens and a span has {span}: use a smaller span")
            tried, unfit[kind, layer] = [], {}
            for name, codec in candidates.items():
                try:
                    tried.append(_tried(name, codec, x, kind, span, spans))
                except ValueError as error:
                    unfit[kind, layer][name] = str(error)
            if not tried:
                raise ValueError(f"layer {layer}, {kind}: no codec fits: {unfit[kind, layer]}")
            trials[kind, layer] = tried
    chosen = _within(trials, bits)
    choices = tuple(
        Choice(
            kind,
            layer,
            chosen[kind, layer],
            tuple(tried),
            _reason(chosen[kind, layer], tried),
            unfit[kind, layer],
        )
        for (kind, layer), tried in trials.items()
    )

    def of(kind: Kind) -> tuple[Codec, ...]:
        return tuple(candidates[choice.chosen.codec] for choice in choices if choice.kind == kind)

    return dataclasses.replace(policy, keys=of("keys"), values=of("values")), choices


def _within(trials: Mapping[tuple[Kind, int], Sequence[Trial]], bits: float) -> dict[tuple[Kind, int], Trial]:
    chosen = {place: min(tried, key=lambda t: (t.bits, t.noise)) for place, tried in trials.items()}
    room = bits * len(trials) - sum(trial.bits for trial in chosen.values())
    if room < -1e-9:
        cheapest = sum(trial.bits for trial in chosen.values()) / len(trials)
        raise ValueError(f"{bits} bits are too few: the cheapest codecs store {cheapest:.3f}; raise them or the span")
    while True:
        best, gain = None, 0.0
        for place, tried in trials.items():
            now = chosen[place]
            for trial in tried:
                more = trial.bits - now.bits
                if trial.noise >= now.noise or more > room + 1e-12:
                    continue
                each = math.inf if more <= 0 else (now.noise - trial.noise) / more
                if each > gain:
                    best, gain = (place, trial), each
        if best is None:
            return chosen
        place, trial = best
        room -= trial.bits - chosen[place].bits
        chosen[place] = trial


def _reason(chosen: Trial, tried: Sequence[Trial]) -> str:
    near = [trial for trial in tried if trial.codec != chosen.codec and trial.bits <= chosen.bits + 1e-9]
    if not near:
        return f"{chosen.sqnr:.1f} dB at {chosen.bits:.2f} bits, the cheapest"
    second = max(near, key=lambda trial: trial.sqnr)
    return (
        f"{chosen.sqnr:.1f} dB at {chosen.bits:.2f} bits; next at no more bits {second.codec}, {second.sqnr:.1f} dB at "
        f"{second.bits:.2f}"
    )
