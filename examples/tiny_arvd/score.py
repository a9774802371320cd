"""Score real clips, real clips with shuffled prompts, and the shipped model on unseen prompts.

python examples/tiny_arvd/score.py --videos 128 --grid out/samples.png

Real clips must score 1.00 and shuffled prompts at chance (shape and colour 1/6, motion 1/8): then the scorer can be
believed about the model.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from fxq.lab import frames_of, tiny_rollout
from fxq.metrics import sprites
from fxq.models.tiny import load_tiny


def show(name: str, scores: dict[str, float]) -> None:
    """One line of scores."""
    print(f"{name:<22}" + "  ".join(f"{key} {value:.3f}" for key, value in scores.items()))


def write_grid(path: pathlib.Path, videos: Tensor, scale: int = 3) -> None:
    """Videos [B, F, 3, H, W] as rows of one picture, a thin line between frames."""
    rows = torch.stack([torch.from_numpy(frames_of(video)) for video in videos])
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1, 0, 1), value=90)
    picture = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (picture.shape[1] * scale, picture.shape[0] * scale)
    Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--weights", type=pathlib.Path, help="another weights file of the same shape")
    parser.add_argument("--grid", type=pathlib.Path, help="write the first ten videos as one picture")
    parser.add_argument("--no-model", action="store_true", help="only check the scorer")
    args = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(args.seed)
    conditions = sprites.sample_conditions(args.videos, generator, unseen=True)
    clips = sprites.render(conditions, generator)
    show("real clips", sprites.score(clips, conditions).means())
    shuffled = conditions[torch.randperm(args.videos, generator=generator)]
    show("shuffled prompts", sprites.score(clips, shuffled).means())
    if args.no_model:
        return
    rollout, conditions = tiny_rollout(load_tiny(args.weights), args.videos, seed=args.seed, unseen=True)
    videos = torch.cat([rollout.rollout(c, d) for c, d in rollout.batches])
    show("the model, unseen", sprites.score(videos, conditions).means())
    if args.grid:
        write_grid(args.grid, videos[:10])
        for condition in conditions[:10]:
            print(sprites.describe(condition))


if __name__ == "__main__":
    main()
