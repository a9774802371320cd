"""Reads dumps of official rollouts and replays them; everything is built from the file itself."""

import dataclasses
import json
import pathlib
import re

import torch
from safetensors import safe_open
from torch import Tensor

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.schedule import FlowSchedule
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.rollout import Draws

_ARGUMENT_OF_FIELD = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "num_heads": "heads",
    "num_layers": "layers",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "in_dim": "channels",
    "out_dim": "channels",
}


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


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What one of our calls saw and returned."""

    call: object
    x: Tensor
    t: Tensor
    cached: int
    flow: Tensor


class Golden:
    """A dump: metadata ``args``, ``config``, ``calls`` and tensors by name."""

    def __init__(self, path: pathlib.Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.args = json.loads(metadata.get("args") or "{}")
        self.official_config = json.loads(metadata.get("config") or "{}")
        self.calls = json.loads(metadata.get("calls") or "[]")

    def numbered(self, pattern: str) -> list[Tensor]:
        found = {int(m[1]): t for name, t in self.tensors.items() if (m := re.fullmatch(pattern, name))}
        return [found[i] for i in sorted(found)]

    @property
    def model(self) -> CausalWan:
        values = {f: self.args[a] for f, a in _ARGUMENT_OF_FIELD.items() if a in self.args}
        names = {f.name for f in dataclasses.fields(CausalWanConfig)}
        values |= {k: v for k, v in self.official_config.items() if k in names}
        (anchor,) = [name for name in self.tensors if name.endswith("patch_embedding.weight")]
        prefix = anchor.removesuffix("patch_embedding.weight")
        state = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        model = CausalWan(CausalWanConfig(**values)).to(self.tensors[anchor].dtype)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    @property
    def sampler(self) -> SamplerConfig:
        args = self.args
        window, chunk = args.get("local_attn_size", -1), args.get("frames_per_chunk", 3)
        sink = args.get("sink_size", 0)
        if window != -1:
            sink = min(sink, window - chunk)  # a larger sink is overwritten by the official code
        return SamplerConfig(
            steps=args.get("steps") or (1000, 750, 500, 250),
            first_chunk_steps=args.get("first_chunk_steps"),
            warp=not args.get("no_warp", False),
            frames_per_chunk=chunk,
            context_noise=float(args.get("context_noise", 0)),
            window=window,
            sink=sink,
            schedule=FlowSchedule(shift=args.get("shift", 5.0)),
        )

    @property
    def given_calls(self) -> int:
        """Calls at the start that only fill the cache with given latents."""
        kinds = [call["kind"] for call in self.calls]
        return self.args.get("initial_chunks", kinds.index("denoise") if kinds else 0)

    def inputs(self) -> tuple[dict[str, Tensor], Replayed]:
        x = self.numbered(r"call\.(\d+)\.x")
        condition = {"prompt_embeds": self.tensors["in.prompt_embeds"]}
        noise = self.tensors["in.noise"]
        if self.given_calls:
            named = [n for n in self.tensors if n.startswith("in.") and ("initial" in n or "given" in n)]
            given = torch.cat(x[: self.given_calls], dim=1)
            condition["initial_latent"] = self.tensors[named[0]][:, : given.shape[1]] if named else given
        first = x[self.given_calls]
        offsets = range(noise.shape[1] - first.shape[1] + 1)
        start = min(offsets, key=lambda o: _difference(noise[:, o : o + first.shape[1]], first))
        noise = noise[:, start:]
        sampler, size = self.sampler, self.sampler.frames_per_chunk
        slots = [
            (chunk, step)
            for chunk in range(noise.shape[1] // size)
            for step in range(len(sampler.timesteps(chunk == 0)) - 1)
        ]
        draws = [d.unflatten(0, (noise.shape[0], size)) for d in self.numbered(r"renoise\.(\d+)\.noise")]
        return condition, Replayed(noise, dict(zip(slots, draws, strict=True)))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    return (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0


def replay(path: pathlib.Path) -> dict[str, float]:
    """Run the rollout of a dump through fxq; returns the largest difference per compared tensor.

    Raises AssertionError when the calls differ in order, kind, frames or position.
    """
    golden = Golden(path)
    model, sampler = golden.model, golden.sampler
    condition, draws = golden.inputs()
    rollout = SelfForcingRollout(model, [(condition, draws)], sampler)
    recorded: list[Recorded] = []
    pending: list[tuple[Tensor, Tensor, int]] = []

    def running(x, t, context, cross_k, cross_v, prefix_k, *rest):
        pending.append((x, t, prefix_k[0].shape[1]))
        return model(x, t, context, cross_k, cross_v, prefix_k, *rest)

    state, after_unit = rollout.begin(condition, draws), []
    with rollout.using(running):
        for _ in range(rollout.units(condition, draws)):
            state = rollout.advance(state, lambda call, out: recorded.append(Recorded(call, *pending.pop(), out[0])))
            after_unit.append(state)

    errors: dict[str, float] = {}
    schedule, tensors = sampler.schedule, golden.tensors
    for name, value in (
        ("sigmas", schedule.sigmas),
        ("timesteps", schedule.timesteps),
        ("steps", torch.tensor(sampler.timesteps(False))),
        ("first_chunk_steps", torch.tensor(sampler.timesteps(True))),
        ("steps_first_chunk", torch.tensor(sampler.timesteps(True))),
    ):
        if f"schedule.{name}" in tensors:
            errors[f"schedule.{name}"] = _difference(value, tensors[f"schedule.{name}"])

    _compare_call_list(golden, recorded)
    for i, ours in enumerate(recorded):
        errors[f"call.{i:03d}.x"] = _difference(ours.x, tensors[f"call.{i:03d}.x"])
        errors[f"call.{i:03d}.t"] = _difference(ours.t, tensors[f"call.{i:03d}.t"].expand(ours.t.shape))
        errors[f"call.{i:03d}.flow"] = _difference(ours.flow, tensors[f"call.{i:03d}.flow"])
        if f"call.{i:03d}.x0" in tensors:
            x0 = schedule.x0(ours.x, ours.flow, ours.t)
            errors[f"call.{i:03d}.x0"] = _difference(x0, tensors[f"call.{i:03d}.x0"])

    unit_of_label = {call.get("chunk"): ours.call.chunk for call, ours in zip(golden.calls, recorded, strict=False)}
    for name, theirs in tensors.items():
        if match := re.fullmatch(r"cache\.(\d+)\.(\d+)\.([kv])", name):
            label, layer = int(match[1]), int(match[2])
            at = after_unit[unit_of_label.get(label, label)]
            ours = (at.keys if match[3] == "k" else at.values)[layer]
            errors[name] = _difference(ours, theirs[:, : ours.shape[1]])
        elif match := re.fullmatch(r"cross\.(\d+)\.([kv])", name):
            ours = (state.cross_k if match[2] == "k" else state.cross_v)[int(match[1])]
            errors[name] = _difference(ours, theirs)

    out = tensors["out.latents"]
    errors["out.latents"] = _difference(state.latents[:, state.latents.shape[1] - out.shape[1] :], out)
    return errors


def _compare_call_list(golden: Golden, recorded: list[Recorded]) -> None:
    assert len(recorded) == len(golden.numbered(r"call\.(\d+)\.flow")), "number of calls"
    if not golden.calls:
        return
    assert len(recorded) == len(golden.calls), "number of calls"
    labels_minus_ours = set()
    for i, (theirs, ours) in enumerate(zip(golden.calls, recorded, strict=True)):
        call, span = ours.call, ours.call.spans[-1]
        tokens = call.tokens_per_frame
        assert call.index == i
        assert call.kind == (theirs["kind"] if i >= golden.given_calls else "given"), f"call {i}: kind"
        facts = {
            "frames": span.frames[1] - span.frames[0],
            "current_start": span.frames[0] * tokens,
            "global_end": span.frames[1] * tokens,
            "local_end": ours.cached + (span.frames[1] - span.frames[0]) * tokens,
        }
        for name, value in facts.items():
            if theirs.get(name) is not None:
                assert value == theirs[name], f"call {i}: {name} is {value}, expected {theirs[name]}"
        if i >= golden.given_calls:
            if theirs.get("chunk") is not None:
                labels_minus_ours.add(theirs["chunk"] - call.chunk)
            if theirs.get("step") is not None:
                assert span.step == theirs["step"], f"call {i}: step"
    assert len(labels_minus_ours) <= 1, f"chunks are numbered differently: offsets {labels_minus_ours}"
