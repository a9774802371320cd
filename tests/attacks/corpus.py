"""Real bundles that mutants and attacks are made of, small enough for thousands of loads."""

import copy
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fxq
from fxq.core.method import FLOAT8, AttentionScheme
from fxq.export.bundle import seal_of
from fxq.export.files import write_tensors
from fxq.export.program import export_program
from tests.toys import recipe, rows, toy

FILES = ("graph.json", "manifest.json", "model.safetensors")


class Nested(nn.Module):
    """Dicts and lists in and out, sizes that vary, a constant and arithmetic on sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 48, bias=False)
        self.norm = nn.LayerNorm(32)
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.register_buffer("shift", torch.arange(32.0))
        self.register_buffer("table", torch.arange(64.0).view(8, 8))

    def forward(self, x, extra, gain=2):
        y = self.first(x["a"]).view(x["a"].shape[0], -1) + self.shift + extra[0][:, : 32 * (gain // 2)]
        heads = self.norm(y).view(1, -1, 4, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2).flatten(0, 1)
        mixed = mixed + self.mix(mixed.unsqueeze(1)).squeeze(1).softmax(-1)
        chosen = torch.nn.functional.embedding(torch.arange(4, device=y.device), self.table).mean()
        padded = torch.cat((mixed, mixed.new_zeros(mixed.shape[0] // 2, 32))) * chosen
        return {"y": self.second(padded), "more": (y.amax(), [y[:, 1:-1:2]])}


@dataclasses.dataclass(frozen=True)
class Base:
    """A bundle, the float model it is of, a call, and what it gives and leaves in its inputs."""

    name: str
    folder: pathlib.Path
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]


def _toy(bits=8, **scheme) -> tuple[nn.Module, fxq.Batch, fxq.Recipe]:
    return toy(), fxq.Batch((rows(9, 96),), {}), recipe(bits, **scheme)


def _nested() -> tuple[nn.Module, fxq.Batch, fxq.Recipe]:
    torch.manual_seed(3)
    batch = fxq.Batch(({"a": rows(6, 64)}, [rows(6, 32, seed=5)]), {"gain": 2})
    return Nested().eval(), batch, recipe(8)


def _attention8() -> tuple[nn.Module, fxq.Batch, fxq.Recipe]:
    model, batch, chosen = _nested()
    return model, batch, dataclasses.replace(chosen, attention=AttentionScheme(max_error=1.0))


MAKERS: dict[str, Callable[[], tuple[nn.Module, fxq.Batch, fxq.Recipe]]] = {
    "w8": _toy,
    "w4": lambda: _toy(4),
    "groups": lambda: _toy(4, weight_group=32),
    "per-token": lambda: _toy(8, per_token=True),
    "asymmetric": lambda: _toy(4, per_token=True, asymmetric=True),
    "fp8": lambda: _toy(format=FLOAT8),
    "nested": _nested,
    "attention8": _attention8,
}


def make(name: str, folder: pathlib.Path) -> Base:
    """Quantize one of the models and save it: ``folder/name`` is a bundle, ``folder/name-program`` a program."""
    model, batch, chosen = MAKERS[name]()
    q = fxq.quantize(model, [batch], chosen, progress=False)
    path = fxq.save(q, folder / name)
    export_program(q, folder / f"{name}-program")
    return Base(name, path, model, batch.args, batch.kwargs, called(q, batch.args, batch.kwargs))


def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call on copies of its inputs, then these, which the call may have written into."""
    given = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        outputs = module(*given[0], **given[1])
    return flat((outputs, given))


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def resign(folder: pathlib.Path, *, seal: bool = True) -> None:
    """Make the hashes fit the files, as an attacker would; the seal too, or not."""
    file = folder / "manifest.json"
    try:
        data = json.loads(file.read_text())
        for name in data["files"]:
            data["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if seal:
            data["seal"] = seal_of(data)
    except (ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
        return
    file.write_text(json.dumps(data))


def edit_json(folder: pathlib.Path, name: str, edit: Callable[[Any], Any], *, seal: bool = True) -> None:
    """Change a JSON file of a bundle and make every hash fit; ``edit`` returns the new value, or None for in place."""
    data = json.loads((folder / name).read_text())
    changed = edit(data)
    (folder / name).write_text(json.dumps(data if changed is None else changed))
    resign(folder, seal=seal)


def edit_tensors(folder: pathlib.Path, edit: Callable[[dict[str, torch.Tensor]], None], *, seal: bool = True) -> None:
    """Change the tensors of a bundle, and the manifest with them."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    edit(tensors)
    file.unlink()  # the tensors are mapped from it
    write_tensors(tensors, file, metadata or {})
    stated = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in tensors.items()
    }
    edit_json(folder, "manifest.json", lambda data: data.update(tensors=stated), seal=seal)


def first(data: dict[str, Any], target: str) -> dict[str, Any]:
    """The first node of a graph whose operator contains a text."""
    return next(node for node in data["nodes"] if target in node["target"])
