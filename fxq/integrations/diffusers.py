"""Lets diffusers read and write the folders of :func:`fxq.export.diffusers_folder.save_diffusers`.

``register()`` once, then ``from_pretrained`` of a model or a pipeline finds the reader by ``quant_method: fxq``.
"""

from __future__ import annotations

import collections
import enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxq.core.ir import stored_names
from fxq.export.diffusers_folder import METHOD, LinearEntry, QuantizationConfig
from fxq.export.files import BundleError
from fxq.export.graph.stored import layer_problems
from fxq.integrations.quantized_linear import QuantizedLinear, buffer_name
from fxq.shadowed import answer_transformers


class Method(enum.StrEnum):
    """The ``quant_method``; diffusers reads its ``value``."""

    FXQ = METHOD


class FxqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a folder that fxq wrote; ``entries`` is its checked content.

    Raises:
        BundleError: when the content is malformed or of another format version.
    """

    def __init__(self, **data: object) -> None:
        self.quant_method = Method.FXQ
        self.entries = QuantizationConfig.from_json(data)

    def to_dict(self) -> dict[str, object]:
        """JSON form, as in ``config.json``."""
        return self.entries.to_json()

    def to_diff_dict(self) -> dict[str, object]:
        """As :meth:`to_dict`: nothing in it is a default."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"FxqConfig({len(self.entries.layers)} layers)"


class FxqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts a :class:`~fxq.integrations.quantized_linear.QuantizedLinear` in each quantized linear's place.

    ``torch_dtype`` casts what is kept in floating point, except what the class keeps in float32; without it every
    tensor has the dtype of the file.
    """

    requires_calibration = True
    use_keep_in_fp32_modules = True
    dtype: torch.dtype | None = None

    def __init__(self, quantization_config: FxqConfig, **options: object) -> None:
        super().__init__(quantization_config, **options)
        self.hooks: list[RemovableHandle] = []

    @property
    def entries(self) -> QuantizationConfig:
        """What the folder says of its layers."""
        return self.quantization_config.entries

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the dtype of tensors kept in floating point."""
        self.dtype = torch_dtype
        return torch_dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """No tensor needs a word of its own when devices are chosen by size."""
        return {}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Refuse files other than safetensors.

        Raises:
            BundleError: naming them.
        """
        if pickles := [str(file) for file in checkpoint_files if not str(file).endswith(".safetensors")]:
            raise BundleError(f"{', '.join(pickles)}: expected safetensors only; copy the whole folder again")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        for layer, entry in self.entries.layers.items():
            parent, _, leaf = layer.rpartition(".")
            try:
                owner, linear = model.get_submodule(parent), model.get_submodule(layer)
            except AttributeError:
                linear = None
            if type(linear) is not nn.Linear or (linear.in_features, linear.out_features) != _sizes(entry):
                raise BundleError(
                    f"layer {layer} of quantization_config is no nn.Linear of {entry.in_features} inputs and "
                    f"{entry.out_features} outputs in {type(model).__name__}: load the folder with its own class"
                )
            empty = _empty_layer(layer, entry, linear)
            self.hooks.append(empty.register_state_dict_post_hook(_as_stored))  # type: ignore[no-untyped-call]
            setattr(owner, leaf, empty)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, object], **kwargs: object
    ) -> bool:
        """Whether a tensor is taken as stored."""
        return self.dtype is None or param_name.rpartition(".")[0] in self.entries.layers

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        """Refuse a tensor of another shape.

        Raises:
            BundleError: always; diffusers asks only when shapes differ.
        """
        raise BundleError(
            f"{param_name} has shape {list(loaded_param.shape)}, expected {list(current_param.shape)}; the folder is "
            "damaged"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Tensor],
        *args: object,
        **kwargs: object,
    ) -> None:
        """Put a tensor into the model with the dtype of the file: ``param_value`` is cast already.

        Raises:
            BundleError: when a quantized layer's tensor has another dtype.
        """
        path, _, leaf = param_name.rpartition(".")
        module, stored = model.get_submodule(path), state_dict[param_name].to(target_device)
        if path in self.entries.layers:
            leaf = buffer_name(leaf)
            if stored.dtype != (expected := getattr(module, leaf).dtype):
                raise BundleError(f"{param_name} is {stored.dtype}, expected {expected}; the folder is damaged")
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
        else:
            module._buffers[leaf] = stored

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> nn.Module:
        absent = [name for name, t in model.state_dict().items() if t.is_meta]
        if absent:
            raise BundleError(f"the folder lacks {len(absent)} tensors of the model: {', '.join(absent[:8])}")
        dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.numel()]
        kept = collections.Counter(dtypes).most_common(1)[0][0] if dtypes else torch.float32
        for layer, entry in self.entries.layers.items():
            module = model.get_submodule(layer)
            assert isinstance(module, QuantizedLinear)
            module.plan = entry.plan(layer, module.perm)
            stored = {name: getattr(module, buffer_name(name)) for name in stored_names(module.plan)}
            for problem in layer_problems(module.plan, stored):
                raise BundleError(f"layer {layer}: {problem}; the folder is damaged")
            in_float32 = set(layer.split(".")) & set(getattr(model, "_keep_in_fp32_modules", None) or ())
            module.set_form(torch.float32 if in_float32 else self.dtype or kept)
            module.lay_out()
        while self.hooks:
            self.hooks.pop().remove()
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, object], safe_serialization: bool = False
    ) -> tuple[dict[str, object], dict[str, object]]:
        """For ``save_pretrained``: the tensors as they are, and the receipt.

        Raises:
            BundleError: when a pickle is asked for.
        """
        if not safe_serialization:
            raise BundleError("a quantized model is saved as safetensors only; leave safe_serialization on")
        stored = dict(state_dict)
        for layer in self.entries.layers:
            _as_stored(None, stored, f"{layer}.", None)
        return stored, dict(self.entries.receipt.to_header())

    @property
    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works."""
        return True


def register() -> None:
    """Make diffusers know ``quant_method: fxq``; calling it again changes nothing."""
    answer_transformers()
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = FxqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FxqConfig


def _sizes(entry: LinearEntry) -> tuple[int, int]:
    return entry.in_features, entry.out_features


def _as_stored(module: nn.Module | None, tensors: dict[str, object], prefix: str, metadata: object) -> None:
    """Give the tensors of one layer in a state dict the names that they have in a folder."""
    tensors.pop(f"{prefix}like", None)
    if f"{prefix}integers" in tensors:
        tensors[f"{prefix}weight"] = tensors.pop(f"{prefix}integers")


def _empty_layer(layer: str, entry: LinearEntry, linear: nn.Linear) -> QuantizedLinear:
    plan = entry.plan(layer)
    form, bits = (linear.weight.dtype, linear.bias is not None), (entry.input_bits, plan.quantization.code_bits)
    return QuantizedLinear(plan, plan.split, *bits, entry.empty_tensors(), dtype=form[0], has_bias=form[1]).eval()
