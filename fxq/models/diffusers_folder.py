"""Models of diffusers from a ``save_pretrained`` folder, without accelerate and without a copy of the weights."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxq.models.checkpoints import FLOAT8, CheckpointError, compact, read_raw
from fxq.models.published.foreign import foreign_kind
from fxq.runtime.messages import close_names
from fxq.runtime.reading import ReadError, read_json
from fxq.shadowed import answer_transformers

CONFIG, INDEX, WEIGHTS = "config.json", "model_index.json", "diffusion_pytorch_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load_folder(path: str | pathlib.Path, dtype: torch.dtype | None = None, subfolder: str | None = None) -> nn.Module:
    """A diffusers model from a local folder, in eval mode, its weights mapped to the files.

    Tensors that keep their dtype are views of the files, which must stay in place while the model lives.

    Args:
        path: folder of a model (``config.json`` and safetensors, one file or shards with an index), or of a pipeline
            (``model_index.json``), whose ``transformer`` is taken.
        dtype: of the model; default: that of most elements in the files. What the class keeps in float32 is float32
            either way, as with ``from_pretrained(torch_dtype=...)``.
        subfolder: component of a pipeline other than ``transformer``.

    Raises:
        CheckpointError: diffusers is not installed or does not know the class, no safetensors, a model that is
            quantized already, or tensors that do not fit the class; all of them are listed.
    """
    folder = find_folder(path, subfolder)
    config = read_config(folder)
    cls = _find_class(config, folder)
    with _parameters_on_meta():
        model = cls.from_config(config)
    tensors = _read_weights(folder)
    model._fix_state_dict_keys_on_load(tensors)
    state = _check(model, tensors, folder)
    chosen = dtype or _main_dtype(state, folder)
    wide = tuple(model._keep_in_fp32_modules or ())
    model.load_state_dict({name: _cast(name, tensor, chosen, wide) for name, tensor in state.items()}, assign=True)
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def find_folder(path: str | pathlib.Path, subfolder: str | None = None) -> pathlib.Path:
    """The folder of a model: ``path``, its ``subfolder``, or the ``transformer`` of a pipeline.

    Raises:
        CheckpointError: when it is not there; the components of a pipeline are named.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is no folder; expected a local folder written by save_pretrained")
    folder = root / subfolder if subfolder else root
    if not subfolder and not (root / CONFIG).is_file() and (root / INDEX).is_file():
        folder = root / "transformer"
    if (folder / CONFIG).is_file():
        return folder
    components = sorted(file.parent.name for file in root.glob(f"*/{CONFIG}"))
    hint = f"; name a subfolder: {', '.join(components)}" if components else "; expected a save_pretrained folder"
    raise CheckpointError(f"{folder} has no {CONFIG}{hint}")


def read_config(folder: pathlib.Path) -> dict[str, object]:
    """The ``config.json`` of a model that is not quantized.

    Raises:
        CheckpointError: no JSON with a ``_class_name``, or with a ``quantization_config``.
    """
    file = folder / CONFIG
    try:
        config = read_json(file, folder)
    except (OSError, ReadError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise CheckpointError(f"{file} names no _class_name; expected the configuration of a diffusers model")
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        remedy = (
            "load it with its class's from_pretrained after fxq.register()"
            if method == "fxq"
            else "give the folder it was made from"
        )
        raise CheckpointError(f"{folder} is quantized already, by {method!r}, and cannot be quantized again; {remedy}")
    return config


def _find_class(config: Mapping[str, Any], folder: pathlib.Path) -> Any:
    answer_transformers()
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(f"{folder} needs diffusers ({error}): pip install 'fxq[wan]'") from None
    name = config["_class_name"]
    cls = getattr(diffusers, name, None) if name in dir(diffusers) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        close = close_names(name, [n for n in dir(diffusers) if n.endswith("Model")], 0.6)
        hint = f"; {close}" if close else ""
        if name.startswith("CausalWan"):
            hint += ". A causal Wan by the names of diffusers is read with --model causal-wan"
        elif reason := foreign_kind(name):
            hint += f". It is {reason}"
        raise CheckpointError(
            f"{folder}: {name} is no model class of diffusers {diffusers.__version__}{hint}. Install the version that "
            f"wrote the folder ({config.get('_diffusers_version', 'not stated')})"
        )
    return cls


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made by this thread get parameters without memory; buffers are real, their values come from code."""
    thread = threading.get_ident()

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _read_weights(folder: pathlib.Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_raw(folder / WEIGHTS)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles and not any(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{folder} holds only {', '.join(pickles)}: reading a pickle could run code, it is refused. Save the model "
            "with save_pretrained(safe_serialization=True)"
        )
    return read_raw(folder)


def _check(model: nn.Module, tensors: Mapping[str, Tensor], folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of the model, when names and shapes fit."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ignored = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name]]
    shapes = [f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}" for name in wrong]
    problems = {
        "missing": compact(name for name in expected if name not in tensors),
        "unexpected": compact(n for n in tensors if n not in expected and not any(part in n for part in ignored)),
        "of another shape": "; ".join(shapes),
    }
    if any(problems.values()):
        listed = ". ".join(f"{what}: {names}" for what, names in problems.items() if names)
        raise CheckpointError(f"{folder} does not hold the {type(model).__name__} of its {CONFIG}. {listed}")
    return {name: tensors[name] for name in expected}


def _main_dtype(tensors: Mapping[str, Tensor], folder: pathlib.Path) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[torch.bfloat16 if tensor.dtype in FLOAT8 else tensor.dtype] += tensor.numel()
    if not counts:
        raise CheckpointError(f"{folder} holds no floating-point tensor; expected the weights of a model")
    return counts.most_common(1)[0][0]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, wide: Collection[str]) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if any(part in wide for part in name.split(".")) else dtype)
