"""Train the tiny autoregressive video model that fxq ships.

    python examples/tiny_arvd/train.py --out runs/tiny

Teacher forcing on rendered clips: a sequence is [clean chunks 0..n-2 | noisy chunks 0..n-1], noisy chunk i attends
to the clean chunks before it and to itself. Stages grow the clip: chunk 0 alone binds words to pictures at a
thirteenth of the cost, then short clips learn motion, then whole videos. Resumable: kill it at any time
and run the same command again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxq.calibration.rollout import Draws
from fxq.metrics import sprites
from fxq.models.causal_wan import CausalSelfAttention, CausalWan, attention, rope_tables
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import CHUNK, TINY, TINY_SAMPLER, save_tiny

TOKENS = CHUNK * (sprites.SIZE // TINY.patch_size[1]) ** 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on clips of ``chunks`` chunks in batches of ``batch``."""

    chunks: int
    batch: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From ``chunks:batch:steps``."""
        return cls(*(int(part) for part in text.split(":")))


class TeacherForcing:
    """Self-attention of a training sequence: block-causal, clean chunks as the context of noisy ones."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        cos, sin = rope_tables(TINY.head_dim, chunks * CHUNK, 5, 5)
        clean = (chunks - 1) * TOKENS
        self.cos, self.sin = torch.cat((cos[:clean], cos)), torch.cat((sin[:clean], sin))

    def __call__(self, attn: CausalSelfAttention, x: Tensor) -> Tensor:
        """Attention output [B, S, dim] of the whole training sequence."""
        n = self.chunks
        q, k, v = (z.split(TOKENS, dim=1) for z in attn.qkv(x, self.cos, self.sin))
        clean, noisy = [], []
        for i in range(n):
            past_k, past_v, at = k[:i], v[:i], n - 1 + i
            noisy.append(attention(q[at], torch.cat((*past_k, k[at]), 1), torch.cat((*past_v, v[at]), 1)))
            if i < n - 1:
                clean.append(attention(q[i], torch.cat(k[: i + 1], 1), torch.cat(v[: i + 1], 1)))
        return attn.o(torch.cat(clean + noisy, dim=1))


def predict(model: CausalWan, clean: Tensor, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """x0 prediction [B, F, C, H, W] of every noisy chunk; ``t`` [B, chunks] in 0..1000."""
    chunks = t.shape[1]
    frames = (chunks - 1) * CHUNK
    x = model.patchify(torch.cat((clean[:, :frames], noisy), dim=1))
    e, e0 = model.embed_time(torch.cat((t.new_zeros(len(t), chunks - 1), t), dim=1))
    text = model.text_embedding(context)
    attend = TeacherForcing(chunks)
    for block in model.blocks:
        x = block(x, e0, *block.cross_attn.kv(text), attend)
    patches = model.head(x[:, (chunks - 1) * TOKENS :], e[:, chunks - 1 :])
    return model.unpatchify(patches, chunks * CHUNK, sprites.SIZE, sprites.SIZE)


def sample_sigma(shape: tuple[int, ...]) -> Tensor:
    """Four draws in five from the sampler's own levels, the rest from the shifted continuum."""
    u = torch.rand(shape)
    shift = TINY_SAMPLER.schedule.shift
    continuous = shift * u / (1 + (shift - 1) * u)
    levels = torch.tensor(TINY_SAMPLER.timesteps(first=False)) / 1000
    return torch.where(torch.rand(shape) < 0.8, levels[torch.randint(len(levels), shape)], continuous).clamp(min=0.02)


def training_loss(
    forward: Callable[..., Tensor], model: CausalWan, batch: int, chunks: int, generator: torch.Generator
) -> Tensor:
    """Weighted x0 error on ``batch`` fresh clips of ``chunks`` chunks."""
    conditions = sprites.sample_conditions(batch, generator, unseen=False)
    clip = sprites.render(conditions, generator, chunks * CHUNK)
    sigma = sample_sigma((batch, chunks))
    s = sigma.repeat_interleave(CHUNK, 1)[:, :, None, None, None]
    dirt = (0.1 * torch.rand(batch, chunks)).repeat_interleave(CHUNK, 1)[:, :, None, None, None]
    clean = clip + dirt * torch.randn_like(clip)
    noisy = (1 - s) * clip + s * torch.randn_like(clip)
    output = forward(model, clean, noisy, sigma * 1000, sprites.prompt_embeds(conditions))
    return ((output - clip).square() / s.clamp(min=0.3).square()).mean()


def evaluate(model: CausalWan, count: int, seed: int) -> dict[str, float]:
    """Scores of a rollout on unseen conditions."""
    generator = torch.Generator().manual_seed(seed)
    conditions = sprites.sample_conditions(count, generator, unseen=True)
    draws = Draws(range(count), (sprites.FRAMES, 3, sprites.SIZE, sprites.SIZE))
    rollout = SelfForcingRollout(model, [({"prompt_embeds": sprites.prompt_embeds(conditions)}, draws)], TINY_SAMPLER)
    return sprites.score(rollout.rollout(*rollout.batches[0]), conditions).means()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--stages", type=Stage.parse, nargs="+", required=True, metavar="CHUNKS:BATCH:STEPS")
    parser.add_argument("--first", type=int, default=64, help="extra chunk-0 clips in every step of longer clips")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--final", type=int, default=2000, help="steps of the closing learning-rate decay")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.out / "state.safetensors", args.out / "log.jsonl"

    torch.manual_seed(0)
    model = CausalWan(TINY)
    torch.nn.init.zeros_(model.head.head.weight)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), fused=True)
    parameters = dict(model.named_parameters())
    average = {k: v.detach().clone() for k, v in parameters.items()}
    done = 0
    for p in parameters.values():
        optimizer.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if state_file.exists():
        saved = load_file(state_file)
        done = int(saved["done"])
        for name, p in parameters.items():
            p.data.copy_(saved[f"model.{name}"])
            average[name].copy_(saved[f"average.{name}"])
            for key, value in optimizer.state[p].items():
                value.copy_(saved[f"{key}.{name}"])

    def save() -> None:
        tensors = {"done": torch.tensor(done)}
        for name, p in parameters.items():
            tensors |= {f"model.{name}": p.detach(), f"average.{name}": average[name]}
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
        save_file(tensors, state_file.with_suffix(".part"))
        state_file.with_suffix(".part").replace(state_file)
        smooth = CausalWan(TINY)
        smooth.load_state_dict(average)
        scores = evaluate(smooth, 64, seed=done)
        save_tiny(args.out / "tiny.safetensors", smooth, {"steps": str(done), "scores": json.dumps(scores)})
        print({"done": done} | scores, flush=True)

    total = sum(stage.steps for stage in args.stages)
    begin, losses, clock = 0, [], time.time()
    for stage in args.stages:
        end = begin + stage.steps
        forward = predict if args.eager else torch.compile(predict, dynamic=False)
        while done < end:
            rate = min(1.0, (done + 1) / 200)
            if total - done < args.final:
                rate *= 0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * (total - done) / args.final))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
            generator = torch.Generator().manual_seed(1_000_000 + done)
            torch.manual_seed(2_000_000 + done)
            loss = training_loss(forward, model, stage.batch, stage.chunks, generator)
            if stage.chunks > 1 and args.first:
                loss = loss + 0.5 * training_loss(forward, model, args.first, 1, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(0.998, (1 + done) / (10 + done))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
            done += 1
            losses.append(loss.item())
            if done % 50 == 0:
                row = {
                    "step": done,
                    "chunks": stage.chunks,
                    "loss": sum(losses) / len(losses),
                    "s": time.time() - clock,
                }
                losses, clock = [], time.time()
                with log_file.open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if done % 500 == 0 or done == end:
                save()
        begin = end


if __name__ == "__main__":
    main()
