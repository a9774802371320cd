"""Weight files of true size with random weights, in the published forms, for measuring what a job costs.

python -m benchmarks.synthetic 1.3b --out /tmp/size            # self-forcing as .pt, 2.8 GB
python -m benchmarks.synthetic 14b --out /tmp/size             # krea-14b as .safetensors, 28.6 GB

A file that is there whole is left as it is. Every tensor is drawn from a generator seeded by its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import zlib
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from fxq.dtypes import dtype_name
from fxq.export.files import plan_file
from fxq.models.families import DTYPES, FAMILIES
from fxq.models.loading import layout
from fxq.runtime.memory.residency import DiskError

OUTLIERS = 24
"""Input channels per linear of a block that are five times as large, so that dual scales have to be stored."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A family to imitate, and the kind of file in which it is published."""

    family: str
    suffix: str


SIZES = {"1.3b": Size("self-forcing", ".pt"), "14b": Size("krea-14b", ".safetensors")}


def make(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor like one of a trained model: outputs of linears keep the size of their inputs."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return tensor.mul_(0.1).add_(1.0).to(dtype)
    if name.endswith("bias"):
        return tensor.mul_(0.02).to(dtype)
    if name.endswith("modulation"):
        return tensor.div_(shape[-1] ** 0.5).to(dtype)
    tensor.div_(shape[1:].numel() ** 0.5)
    if name.startswith("blocks.") and len(shape) == 2:
        tensor[:, torch.randperm(shape[1], generator=generator)[:OUTLIERS]] *= 5
    return tensor.to(dtype)


def write_checkpoint(size: str, folder: pathlib.Path, dtype: torch.dtype = torch.bfloat16) -> pathlib.Path:
    """Write the weight file of a size, or leave the whole one that is there.

    Raises:
        DiskError: the disk has no room.
    """
    form = SIZES[size]
    shapes = layout(FAMILIES[form.family].config)
    path = folder / f"{form.family}-{dtype_name(dtype)}{form.suffix}"
    if path.exists():
        return path
    needed = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    if needed + (1 << 30) > (free := shutil.disk_usage(folder).free):
        raise DiskError(f"{path} needs {needed / 1e9:.1f} GB and 1 GB to spare; {folder} has {free / 1e9:.1f} GB left")
    part = path.with_suffix(".part")
    if form.suffix == ".pt":
        state = {f"model.{name}": make(name, shape, dtype) for name, shape in shapes.items()}
        torch.save({"generator_ema": state}, part)
    else:
        _stream(shapes, dtype, part)
    part.rename(path)
    return path


def _stream(shapes: Mapping[str, torch.Size], dtype: torch.dtype, path: pathlib.Path) -> None:
    """Write a safetensors file with one tensor in memory at a time."""
    prefix = "model."
    header, names = plan_file({prefix + n: torch.empty(s, dtype=dtype, device="meta") for n, s in shapes.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            plain = name.removeprefix(prefix)
            file.write(make(plain, shapes[plain], dtype).flatten().view(torch.uint8).numpy().data)


def write_prompts(folder: pathlib.Path, text_dim: int = 4096, tokens: int = 37) -> pathlib.Path:
    """Two prompt embeddings, float32 [tokens, text_dim], as a safetensors file."""
    path = folder / "prompts.safetensors"
    generator = torch.Generator().manual_seed(0)
    prompts = {name: torch.randn(tokens, text_dim, generator=generator) / 4 for name in ("first", "second")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(prompts, path)
    return path


def main() -> None:
    """Write the files and print their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    print(write_checkpoint(args.size, args.out, DTYPES[args.dtype]))
    print(write_prompts(args.out))


if __name__ == "__main__":
    main()
