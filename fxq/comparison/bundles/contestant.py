"""Who is compared: full precision, and bundles made ready to run in its place."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fxq.cache.policy import CachePolicy
from fxq.comparison.methods import ComparisonError
from fxq.core.summary import Summary, summary
from fxq.export import load
from fxq.models.causal_wan import CausalWan
from fxq.models.self_forcing import SelfForcingRollout
from fxq.optimize import optimize
from fxq.passes.with_cache import policy_of

FULL_PRECISION = "full precision"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One that makes every video.

    Attributes:
        name: in tables and files.
        module: what runs in the denoiser's place; None: the denoiser itself.
        policy: of its cache, None: the rollout's own.
        bits: of its linears, such as ``W4A8``.
        size_ratio: bytes of all linears over bf16, those that are kept as bf16.
        digest: what tells it from others of its name.
    """

    name: str
    module: Callable[..., object] | None = None
    policy: CachePolicy | None = None
    bits: str = "-"
    size_ratio: float = 1.0
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class BundleFolder:
    """A bundle that was not loaded yet: its folder, its name among the others, and the hash of its manifest."""

    path: pathlib.Path
    name: str
    digest: str


def bundle_folders(paths: Sequence[pathlib.Path]) -> list[BundleFolder]:
    """Bundles by the names of their folders, with as many folders above as tell them apart.

    Raises:
        ComparisonError: when one is given twice, or is no bundle.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise ComparisonError(f"bundles {', '.join(map(str, paths))}: expected each once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    found = []
    for given, path in zip(paths, whole, strict=True):
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise ComparisonError(f"{given} is no bundle: it has no manifest.json. Expected a folder of fxq quantize")
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        found.append(BundleFolder(given, "/".join(path.parts[-depth:]), digest))
    names = [folder_name(name) for name in (FULL_PRECISION, *(bundle.name for bundle in found))]
    if len(set(names)) < len(names):
        raise ComparisonError(
            f"bundles {', '.join(b.name for b in found)}: their videos would lie in one folder; rename"
        )
    return found


def folder_name(name: str) -> str:
    """A contestant's name as that of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).strip(".") or "_"


def contestant_of(bundle: BundleFolder, rollout: SelfForcingRollout) -> Contestant:
    """Load a bundle to where the model lies, and optimize it: what is compared is what the bundle holds, everywhere.

    Raises:
        BundleError: when it cannot be read.
        ComparisonError: when it was made of another model.
    """
    module = load(bundle.path, rollout.model.patch_embedding.weight.device)
    facts = summary(module)
    _check_model(bundle, facts, rollout.model)
    return Contestant(
        name=bundle.name,
        module=optimize(module, floats_where_faster=False),
        policy=policy_of(module),
        bits="/".join(dict.fromkeys(row.bits for row in facts.quantized)) or "-",
        size_ratio=_size_ratio(facts),
        digest=bundle.digest,
    )


def _check_model(bundle: BundleFolder, facts: Summary, model: nn.Module) -> None:
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = [row for row in facts.quantized if row.layer in linears]
    if facts.quantized and not known:
        raise ComparisonError(f"{bundle.path} is of another model: the model has no {facts.quantized[0].layer}")
    for row in known:
        shape = tuple(linears[row.layer].weight.shape)
        if shape != tuple(row.shape):
            raise ComparisonError(
                f"{bundle.path} is of another model: {row.layer} is {row.shape[0]} x {row.shape[1]} there, "
                f"{shape[0]} x {shape[1]} in the model"
            )


def _size_ratio(facts: Summary) -> float:
    kept = sum(row.bf16_bytes for row in facts.kept if row not in facts.others)
    stored, full = (sum(getattr(row, name) for row in facts.quantized) for name in ("bytes", "bf16_bytes"))
    return (stored + kept) / (full + kept) if full + kept else 1.0


def make_room(contestant: Contestant, model: CausalWan) -> None:
    """Take the float blocks off the GPU while a bundle runs in their place.

    The loop itself asks for the first layer only, and where layers absorb for the others' weights too.
    """
    device = model.patch_embedding.weight.device
    absorbs = contestant.policy is not None and contestant.policy.absorb is not None
    for name, part in model.named_children():
        if name != "patch_embedding":
            part.to(device if absorbs else torch.device("cpu"))
