"""From a published file to a model: checked against its family first, then mapped, merged and cast."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.checkpoints import FLOAT8, KEYS, CheckpointError, compact, read_tensors
from fxq.models.families import FAMILIES, FLOATS, Family
from fxq.models.lora import Update, check_updates, read_lora
from fxq.models.published.adapters import adapted, own_layer
from fxq.models.published.foreign import foreign_names
from fxq.models.published.sizes import sizes_of

_PIECE = 1 << 29


def layout(config: CausalWanConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a model of these sizes; allocates nothing."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CausalWan(config).state_dict().items()}


def load_causal_wan(
    path: str | pathlib.Path,
    family: Family,
    *,
    lora: str | pathlib.Path | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
) -> CausalWan:
    """A model from a published file, in eval mode, without a second copy of the weights.

    Tensors that keep their dtype stay mapped to the file, so the file must stay in place while the model lives.

    Args:
        path: weight file or folder, see :func:`~fxq.models.checkpoints.read_tensors`.
        family: what the file must hold.
        lora: LoRA file to merge, see :func:`~fxq.models.lora.read_lora`.
        lora_alpha: its alpha, if the file does not say.
        dtype: of the model; default: the dtype of most elements of the file, to which the others are cast.

    Raises:
        CheckpointError: a file that cannot be read or holds something else: what is missing, unexpected or of
            another shape is listed, and the closest family is named. Nothing is allocated before that check.
    """
    if family.lora and lora is None:
        raise CheckpointError(
            f"{family.name} is published as a base and a LoRA ({family.source}); name the LoRA file as well. Weights "
            "that are merged already are a causal-wan model"
        )
    path = pathlib.Path(path)
    tensors = _read(path, family.keys)
    check_layout(tensors, family, path)
    updates = {} if lora is None else {own_layer(name): u for name, u in read_lora(lora, lora_alpha).items()}
    check_updates(tensors, updates, pathlib.Path(lora or ""))
    with torch.device("meta"):
        model = CausalWan(family.config)
    state = tensors | _changed(path, family.keys, tensors, updates, dtype or _main_dtype(tensors, path))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _read(path: pathlib.Path, keys: Sequence[str]) -> dict[str, Tensor]:
    return adapted(read_tensors(path, keys))


def seen_sizes(path: str | pathlib.Path, keys: Sequence[str] = KEYS) -> dict[str, object]:
    """Settings that the shapes in a file show, see :func:`~fxq.models.published.sizes.sizes_of`; no weight is read.

    Raises:
        CheckpointError: when the file cannot be read, or is of a family that is not.
    """
    path = pathlib.Path(path)
    tensors = _read(path, keys)
    if reason := foreign_names(tensors):
        raise CheckpointError(f"{path} holds {reason}")
    return sizes_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def _changed(
    path: pathlib.Path,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor],
    updates: Mapping[str, Update],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors that get a LoRA update or another dtype.

    The file is mapped anew for every piece of it, so that its pages are given back before the next piece is read.
    """
    changed: dict[str, Tensor] = {}
    fresh, read = tensors, _PIECE
    for name, tensor in tensors.items():
        update = updates.get(name.removesuffix(".weight"))
        if update is None and tensor.dtype == dtype:
            continue
        if read >= _PIECE:
            fresh, read = _read(path, keys), 0
        read += tensor.nbytes
        changed[name] = fresh[name].to(dtype) if update is None else update.merged(fresh[name], dtype)
    return changed


def _main_dtype(tensors: Mapping[str, Tensor], path: pathlib.Path) -> torch.dtype:
    known = (*FLOATS.values(), *FLOAT8)
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in known]:
        raise CheckpointError(
            f"{path}: {compact(strange)} is {tensors[strange[0]].dtype}, expected {', '.join(FLOATS)}; a file that is "
            "quantized already cannot be quantized again"
        )
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[torch.bfloat16 if tensor.dtype in FLOAT8 else tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def check_layout(tensors: Mapping[str, Tensor], family: Family, path: pathlib.Path) -> None:
    """Compare names and shapes with the family's.

    Raises:
        CheckpointError: listing every difference and the closest family.
    """
    if reason := foreign_names(tensors):
        raise CheckpointError(f"{path} holds {reason}")
    expected = layout(family.config)
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name]]
    if not (missing or extra or wrong):
        return
    counts, lists = [], []
    for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong)):
        if names:
            counts.append(f"{len(names)} {what}")
            lists.append(f"{what}: {compact(names)}")
    if wrong:
        name = wrong[0]
        lists[-1] += f" ({name} is {list(tensors[name].shape)}, expected {list(expected[name])})"
    raise CheckpointError(
        f"{path} does not hold {family.name}: of {len(expected)} tensors {', '.join(counts)}. {_closest(tensors)}. "
        f"In full, {'; '.join(lists)}"
    )


def _closest(tensors: Mapping[str, Tensor]) -> str:
    """One sentence: which families the tensors fit best."""
    fitting: dict[CausalWanConfig, tuple[int, int]] = {}
    for family in FAMILIES.values():
        expected = layout(family.config)
        fits = sum(name in tensors and tensors[name].shape == shape for name, shape in expected.items())
        fitting[family.config] = (fits, len(expected))
    config, (fits, total) = max(fitting.items(), key=lambda item: item[1][0])
    names: Sequence[str] = [f.name for f in FAMILIES.values() if f.config == config and f.name != "causal-wan"]
    if not fits:
        return (
            "No family has a tensor in common with it; another size of causal Wan is read as causal-wan, with --set "
            "num_heads=N or a config.json"
        )
    return f"The closest family is {' or '.join(names)}: {fits} of its {total} tensors fit"
