"""Reads dumps of official rollouts; every setting comes from the file itself.

A file holds the weights, the inputs, every call and the result of one rollout. Metadata entries ``args``, ``config``
and ``calls`` are JSON. What they leave out is read off the tensors where these tell it, what they add is ignored.
"""

import json
import pathlib
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.schedule import FlowSchedule
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference to the official tensor, by the dtype of the weights, for values up to 1 (above, in proportion)."""

_ANCHOR = "patch_embedding.weight"


class GoldenError(AssertionError):
    """A dump that cannot be read, or whose list of calls differs from ours."""


class Replayed(Draws):
    """Noise and renoise draws read from a file."""

    def __init__(self, noise: Tensor, renoise: dict[tuple[int, int], Tensor]) -> None:
        super().__init__(range(noise.shape[0]), noise.shape[1:])
        self._noise, self._renoise = noise, renoise

    @property
    def noise(self) -> Tensor:
        return self._noise

    def renoise(self, chunk: int, step: int, frames: int) -> Tensor:
        return self._renoise[chunk, step]


class Golden:
    """A dump: metadata ``args``, ``config``, ``calls`` and tensors by name."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        try:
            with safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise GoldenError(f"{self.path} is no safetensors file: {error}") from None
        self.args = self._json("args", {})
        self.official_config = self._json("config", {})
        self.calls = self._json("calls", [])
        self.tensor("out.latents"), self.tensor("in.noise"), self.tensor("in.prompt_embeds")

    def _json(self, entry: str, default: Any) -> Any:
        try:
            value = json.loads(self.metadata.get(entry) or "null")
        except ValueError as error:
            raise GoldenError(f"{self.path}: metadata {entry!r} is no JSON: {error}") from None
        if value is not None and type(value) is not type(default):
            raise GoldenError(f"{self.path}: metadata {entry!r} is a {type(value).__name__}, expected {default!r}")
        return default if value is None else value

    def tensor(self, name: str) -> Tensor:
        """A tensor that every dump has."""
        if name not in self.tensors:
            kinds = sorted({re.sub(r"\d+", "N", n) for n in self.tensors if "model." not in n})
            raise GoldenError(f"{self.path} has no tensor {name}; it has {', '.join(kinds)}")
        return self.tensors[name]

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first setting of ``args`` or ``config`` that is there and not null."""
        for source in (self.args, self.official_config):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return default

    def numbered(self, pattern: str) -> list[Tensor]:
        found = {int(m[1]): t for name, t in self.tensors.items() if (m := re.fullmatch(pattern, name))}
        return [found[i] for i in sorted(found)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict, without the wrapper's prefix."""
        anchors = [name for name in self.tensors if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
        if len(anchors) != 1:
            raise GoldenError(f"{self.path}: expected one tensor ...{_ANCHOR}, found {anchors}")
        prefix = anchors[0].removesuffix(_ANCHOR)
        own = [n for n in self.tensors if not re.match(r"(call|in|out|renoise|cache|cross|schedule)\.", n)]
        return {name.removeprefix(prefix): self.tensors[name] for name in own if name.startswith(prefix)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weights[_ANCHOR].dtype

    @property
    def config(self) -> CausalWanConfig:
        """Sizes: from the shapes of the weights where these tell them."""
        weights = self.weights
        embedding = weights[_ANCHOR]
        blocks = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))}
        cached = [t for name, t in self.tensors.items() if name.startswith(("cross.", "cache."))]
        heads = self.setting("num_heads", "heads", default=cached[0].shape[2] if cached else None)
        if heads is None:
            raise GoldenError(f"{self.path}: neither args nor config has num_heads, and no cache shows it")
        _, rows, columns = embedding.shape[2:]
        return CausalWanConfig(
            dim=embedding.shape[0],
            ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0],
            num_heads=heads,
            num_layers=len(blocks),
            freq_dim=weights["time_embedding.0.weight"].shape[1],
            text_dim=weights["text_embedding.0.weight"].shape[1],
            text_len=self.setting("text_len", default=self.tensor("in.prompt_embeds").shape[1]),
            in_dim=embedding.shape[1],
            out_dim=weights["head.head.weight"].shape[0] // (rows * columns),
            patch_size=tuple(embedding.shape[2:]),
            qk_norm="blocks.0.self_attn.norm_q.weight" in weights,
            cross_attn_norm="blocks.0.norm3.weight" in weights,
            eps=self.setting("eps", default=1e-6),
        )

    @property
    def model(self) -> CausalWan:
        model = CausalWan(self.config).to(self.dtype)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise GoldenError(f"{self.path}: {error}") from None
        return model.eval().requires_grad_(False)

    @property
    def frames_per_chunk(self) -> int:
        first = self.numbered(r"call\.(\d+)\.x")
        size = self.setting("frames_per_chunk", "num_frame_per_block", default=first[0].shape[1] if first else None)
        if size is None:
            raise GoldenError(f"{self.path}: frames_per_chunk is not in args and no call shows it")
        return size

    @property
    def window(self) -> int:
        if (size := self.setting("local_attn_size")) is not None:
            return size
        if rolled := [c for c in self.calls if c.get("local_end") != c.get("global_end")]:
            raise GoldenError(f"{self.path}: its cache was rolled (call {rolled[0]}) and args has no local_attn_size")
        return -1

    @property
    def sampler(self) -> SamplerConfig:
        window, chunk, sink = self.window, self.frames_per_chunk, self.setting("sink_size", default=0)
        if window != -1:
            sink = min(sink, window - chunk)  # a larger sink is overwritten by the official code
        steps = self.setting("steps", "denoising_step_list")
        warp = self.setting("warp_denoising_step", default=not self.setting("no_warp", default=False))
        if steps is None:  # the dump has them warped
            steps, warp = self.tensor("schedule.steps").tolist(), False
        return SamplerConfig(
            steps=steps,
            first_chunk_steps=self.setting("first_chunk_steps", "denoising_step_list_first_chunk"),
            warp=warp,
            frames_per_chunk=chunk,
            context_noise=float(self.setting("context_noise", default=0)),
            cache=CachePolicy(window=window, sink=sink),
            schedule=FlowSchedule(shift=self.setting("shift", "timestep_shift", default=5.0)),
        )

    @property
    def given_calls(self) -> int:
        """Calls at the start that only fill the cache with given latents."""
        kinds = [call.get("kind") for call in self.calls]
        return self.setting("initial_chunks", default=kinds.index("denoise") if "denoise" in kinds else 0)

    def inputs(self) -> tuple[dict[str, Tensor], Replayed]:
        """Condition and draws; noise of given frames, if the file has it, is left out."""
        x = self.numbered(r"call\.(\d+)\.x")
        if len(x) <= self.given_calls:
            raise GoldenError(f"{self.path}: {len(x)} calls, of which {self.given_calls} are given latents")
        condition = {"prompt_embeds": self.tensor("in.prompt_embeds")}
        if self.given_calls:
            named = [n for n in self.tensors if n.startswith("in.") and ("initial" in n or "given" in n)]
            given = torch.cat(x[: self.given_calls], dim=1)
            condition["initial_latent"] = self.tensors[named[0]][:, : given.shape[1]] if named else given
        noise, first = self.tensor("in.noise"), x[self.given_calls]
        offsets = range(noise.shape[1] - first.shape[1] + 1)
        start = min(offsets, key=lambda o: difference(noise[:, o : o + first.shape[1]], first))
        return condition, self._draws(noise[:, start:])

    def _draws(self, noise: Tensor) -> Replayed:
        sampler, size = self.sampler, self.frames_per_chunk
        slots = [
            (chunk, step)
            for chunk in range(noise.shape[1] // size)
            for step in range(len(sampler.timesteps(chunk == 0)) - 1)
        ]
        draws = [d.reshape(-1, size, *noise.shape[2:]) for d in self.numbered(r"renoise\.(\d+)\.noise")]
        if len(draws) != len(slots):
            raise GoldenError(
                f"{self.path}: {len(draws)} renoise draws, expected {len(slots)} for {noise.shape[1] // size} chunks "
                f"of {size} frames with steps {sampler.steps}, first chunk {sampler.first_chunk_steps or sampler.steps}"
            )
        return Replayed(noise, dict(zip(slots, draws, strict=True)))

    @property
    def rollout(self) -> SelfForcingRollout:
        """The rollout of the file, with its own draws."""
        return SelfForcingRollout(self.model, [self.inputs()], self.sampler)

    def tolerance(self, name: str) -> float:
        """Largest difference that a replayed tensor may have."""
        if name.endswith(".t") or name.startswith("schedule."):
            return TOLERANCES[torch.float32]
        peak = self.tensors[name].abs().max().item() if self.tensors[name].numel() else 0.0
        return TOLERANCES[self.dtype] * max(1.0, peak)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    return (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
