"""Weight files of causal Wan models, read without copying: ``.pt``, safetensors, sharded folders.

Every tensor is a view of the mapped file, so reading costs address space, not memory. Nothing in a file is executed.
"""

from __future__ import annotations

import mmap
import os
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq.models.archives import check_archive, check_loaded
from fxq.runtime.messages import first_line
from fxq.runtime.reading import ReadError, TensorHeader, read_header, read_json, regular_file

KEYS = ("generator_ema", "generator", "ema", "model", "state_dict", "module")
"""Where training checkpoints keep the denoiser, the preferred place first."""
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("generator.", "model.", "module.", "diffusion_model.")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Weights cast to these, with no scales, are read as bfloat16, which has all of their values."""
_SCALES = ("_scale", ".scale", "scale_weight", "scale_input", "weight_scale_inv", "scaled_fp8", ".comfy_quant")
"""How names end that say that 8-bit numbers are multiplied by something."""
_PIECE = 1 << 30
_INDEX = ".safetensors.index.json"


class CheckpointError(ValueError):
    """A weight file that cannot be read, or that does not hold the model it is read for."""


def read_tensors(path: str | pathlib.Path, keys: Sequence[str] = KEYS) -> dict[str, Tensor]:
    """Tensors of a weight file by their plain names, mapped and not copied.

    Args:
        path: ``.pt`` (zip format), ``.safetensors``, or a folder of safetensors with an index if there are several.
        keys: top-level entries of a ``.pt`` that may hold the state dict; the first that is there counts. A ``.pt``
            that is a bare state dict needs none.

    Returns:
        Name to tensor; wrapper prefixes (``model.``, ``_fsdp_wrapped_module.``, ...) are taken off, and a fused
        ``self_attn.to_qkv`` is dropped beside its parts or split into them.

    Raises:
        CheckpointError: file missing, truncated, of another format, with code in it, or with no state dict.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a .pt file, a .safetensors file or a folder of them")
    return _split_fused(plain_names(read_raw(path, keys), path))


def read_raw(path: pathlib.Path, keys: Sequence[str] = KEYS) -> dict[str, Tensor]:
    """As :func:`read_tensors`, with the names of the file."""
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLED:
        return _state_dict(_read_pickled(path), path, keys)
    raise CheckpointError(f"{path}: unknown kind of file; expected {', '.join(_PICKLED)}, .safetensors or a folder")


def _read_pickled(path: pathlib.Path) -> object:
    try:
        check_archive(path)
        found = torch.load(regular_file(path), map_location="cpu", weights_only=True, mmap=True)
        check_loaded(found, path)
        return found
    except (ReadError, MemoryError) as error:
        raise CheckpointError(f"{path} is refused: {_first_sentence(error)}. Save only the state dict") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the object {found[1]}" if found else "more than tensors (or is damaged)"
        raise CheckpointError(
            f"{path} is refused: it holds {what}, and reading that could run code. Save only the state dict, as "
            "safetensors or with torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if "unable to mmap" in str(error):
            reason = "it is larger than the memory of this machine; save it as safetensors, which is mapped in parts"
        elif "mmap can only be used" in str(error):
            reason = "it is no zip-format torch file; save it again with torch.save, or download it again"
        else:
            reason = f"it is truncated or damaged ({_first_sentence(error)}); download or copy it again"
        raise CheckpointError(f"{path} cannot be read: {reason}. It has {path.stat().st_size} bytes") from None


def _first_sentence(error: Exception) -> str:
    return first_line(error).split(". ")[0][:160]


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _state_dict(content: Any, path: pathlib.Path, keys: Sequence[str]) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return {name: tensor.detach() for name, tensor in content.items()}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict or one under {keys}")
    for key in keys:
        if _is_state_dict(content.get(key)):
            return {name: tensor.detach() for name, tensor in content[key].items()}
    found = ", ".join(f"{k} ({type(v).__name__})" for k, v in list(content.items())[:12])
    raise CheckpointError(f"{path} has no state dict under any of {', '.join(keys)}; its top-level entries are {found}")


def _read_safetensors(path: pathlib.Path, folder: pathlib.Path | None = None) -> dict[str, Tensor]:
    try:
        header = read_header(path, folder)  # header and data fit together
        eight = [name for name, tensor in header.tensors.items() if tensor.dtype.startswith("F8_")]
        if eight and (scales := [name for name in header.tensors if name.endswith(_SCALES)]):
            raise CheckpointError(
                f"{path}: {compact(eight)} is {header.tensors[eight[0]].dtype} with scales ({compact(scales, 3)}); a "
                "file that is quantized already cannot be quantized again: take the float weights it was made from"
            )
        if strange := [name for name, tensor in header.tensors.items() if tensor.dtype not in _DTYPES]:
            raise CheckpointError(
                f"{path}: {compact(strange)} is {header.tensors[strange[0]].dtype}, expected {', '.join(_DTYPES)}; a "
                "file that is quantized already cannot be quantized again"
            )
        return _map(regular_file(path, folder), header)
    except (ReadError, OSError) as error:
        size = f". It has {path.stat().st_size} bytes" if path.is_file() else ""
        raise CheckpointError(
            f"{path} cannot be read: {_first_sentence(error)}{size} and is truncated or no safetensors file; download "
            "or copy it again"
        ) from error


def _map(path: pathlib.Path, header: TensorHeader) -> dict[str, Tensor]:
    """Tensors of a checked safetensors file as private views of it.

    Mapped in pieces: one private mapping larger than the machine's memory is refused by the system.
    """
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        mapped, start, length = None, 0, 0
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
            dtype = _DTYPES[entry.dtype]
            begin, end = header.start + entry.begin, header.start + entry.end
            if begin == end:
                tensors[name] = torch.empty(entry.shape, dtype=dtype)
                continue
            if mapped is None or end > start + length:
                start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                length = min(max(_PIECE, end - start), total - start)
                mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin - start)
            tensors[name] = flat.view(entry.shape)
    return tensors


def _read_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    shards, listed = _shards(folder)
    if gone := [name for name in shards if not (folder / name).exists()]:
        raise CheckpointError(f"{folder}: {len(gone)} of {len(shards)} shards are missing: {', '.join(gone)}")
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors |= _read_safetensors(folder / name, folder)
    if absent := sorted(listed - tensors.keys()):
        raise CheckpointError(f"{folder}: the index lists tensors that no shard holds: {compact(absent)}")
    return tensors


def _shards(folder: pathlib.Path) -> tuple[list[str], set[str]]:
    """Shard files of a folder, and the tensors its index promises."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        try:
            weights = read_json(indices[0], folder)["weight_map"]
            names = sorted({str(name) for name in weights.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{indices[0]} is no index: expected JSON with a weight_map") from error
        if outside := [name for name in names if pathlib.PurePath(name).name != name or "\\" in name]:
            raise CheckpointError(f"{indices[0]} points outside its folder: {', '.join(outside)}")
        return names, set(weights)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if indices or len(files) != 1:
        raise CheckpointError(
            f"{folder} has {len(files)} .safetensors files and {len(indices)} indices; expected one file, or shards "
            f"with one *{_INDEX}. Name the file itself if you mean one of them"
        )
    return files, set()


def plain_names(tensors: Mapping[str, Tensor], path: pathlib.Path) -> dict[str, Tensor]:
    """``tensors`` without the prefixes of wrappers.

    Raises:
        CheckpointError: when two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        for wrapper in _WRAPPERS:
            short = short.replace(wrapper, "")
        while short.startswith(PREFIXES):
            short = short.split(".", 1)[1]
        if short in plain:
            raise CheckpointError(f"{path}: two tensors mean {short}, one of them is {name}; keep one model per file")
        plain[short] = tensor
    return plain


def _split_fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in [n for n, tensor in tensors.items() if ".to_qkv." in n and tensor.ndim]:
        fused = tensors.pop(name)
        for part, rows in zip("qkv", fused.chunk(3), strict=False):
            tensors.setdefault(name.replace(".to_qkv.", f".{part}."), rows)
    return tensors


def compact(names: Iterable[str], limit: int = 40) -> str:
    """Names in one line, equal ones of several blocks as one: ``blocks.[0-2,5].ffn.0.weight``."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"blocks\.(\d+)\.(.*)", name)
        blocks.setdefault(f"blocks.[].{match[2]}" if match else name, []).append(int(match[1]) if match else -1)
    shown = [pattern.replace("[]", f"[{_ranges(sorted(numbers))}]", 1) for pattern, numbers in blocks.items()]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
