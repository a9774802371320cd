"""A quantized model of diffusers as the folder that its own class reads with ``from_pretrained``; docs/diffusers.md."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx, nn

import fxq.numerics
from fxq.core.config import RecipeError, Scheme
from fxq.core.facts import Facts
from fxq.core.ir import LayerPlan, get_tensor, module_path, planned, stored_names
from fxq.core.layer import told_in_graph
from fxq.core.method import INTEGER
from fxq.export.bundle import load
from fxq.export.files import BundleError, whole_folder, write_tensors
from fxq.export.graph.strict import MAX_FEATURES, Name, SchemaError, Size, Text, check_plan, validated
from fxq.export.receipt import Receipt, make_receipt
from fxq.metrics.deviation import MOST_DEVIATION, deviation_in_steps
from fxq.passes.methods.grid import group_steps
from fxq.runtime.reading import MAX_TENSORS
from fxq.version import __version__

METHOD, FORMAT_VERSION = "fxq", 1
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


_Features = Annotated[int, Field(ge=1, le=MAX_FEATURES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearEntry:
    """One quantized linear: sizes, bits, format, and how many outlier channels have a scale of their own."""

    in_features: _Features
    out_features: _Features
    weight_bits: int
    input_bits: int
    outliers: Size = 0
    per_token: bool = False
    asymmetric: bool = False
    output_sqnr: float | None = None
    format: str = INTEGER
    weight_group: int = 0

    @classmethod
    def of(cls, plan: LayerPlan) -> LinearEntry:
        """The entry of a layer with a scheme."""
        scheme = plan.quantization
        return cls(
            in_features=plan.in_features,
            out_features=plan.out_features,
            weight_bits=scheme.weight_bits,
            input_bits=scheme.input_bits,
            outliers=len(plan.outliers),
            per_token=scheme.per_token,
            asymmetric=scheme.asymmetric,
            output_sqnr=plan.output_sqnr,
            format=scheme.format,
            weight_group=scheme.weight_group,
        )

    def plan(self, layer: str, perm: Tensor | None = None) -> LayerPlan:
        """The plan; its outliers are the last channels of ``perm`` [K], or placeholders of the right number."""
        scheme = Scheme(
            weight_bits=self.weight_bits,
            input_bits=self.input_bits,
            per_token=self.per_token,
            asymmetric=self.asymmetric,
            format=self.format,
            weight_group=self.weight_group,
        )
        channels = range(self.in_features) if perm is None else perm.tolist()
        return LayerPlan(
            layer=layer,
            in_features=self.in_features,
            out_features=self.out_features,
            scheme=scheme,
            outliers=tuple(channels[self.in_features - self.outliers :]),
            output_sqnr=self.output_sqnr,
        )

    def empty_tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by name, of the right dtype and shape, without memory."""
        groups, plan = 1 + bool(self.outliers), self.plan("")
        width = self.in_features // 2 if plan.quantization.code_bits == 4 else self.in_features
        forms = {
            "weight": ((self.out_features, width), plan.quantization.stored_dtype),
            "weight_scale": ((groups, self.out_features), torch.float32),
            "input_scale": ((groups,), torch.float32),
            "input_zero_point": ((groups,), torch.int32),
            "offset": ((self.out_features,), torch.float32),
            "perm": ((self.in_features,), torch.int32),
        }
        names = stored_names(plan)
        return {name: torch.empty(forms[name][0], dtype=forms[name][1], device="meta") for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The ``quantization_config`` of a ``config.json``: every linear that is quantized, and why the others are not."""

    layers: Annotated[dict[Name, LinearEntry], Field(max_length=MAX_TENSORS)]
    kept: Annotated[dict[Name, Text], Field(max_length=MAX_TENSORS)]
    receipt: Receipt
    fxq_version: Text
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, object]:
        """JSON form, with the ``quant_method`` by which diffusers finds the reader."""
        data = {"quant_method": METHOD, **dataclasses.asdict(self)}
        for entry in data["layers"].values():
            if entry["format"] == INTEGER:  # as before there were others
                del entry["format"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> QuantizationConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            BundleError: another format version, or missing and malformed fields.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"quantization_config has format version {data.get('format_version')!r}, this fxq reads "
                f"{FORMAT_VERSION}; load it with the fxq version that wrote it ({data.get('fxq_version', 'unknown')})"
            )
        try:
            found = validated(cls, {k: v for k, v in data.items() if k != "quant_method"})
            for layer, entry in found.layers.items():
                if not entry.outliers < entry.in_features:
                    raise SchemaError(f"layers.{layer}: {entry.outliers} outliers of {entry.in_features} inputs")
                check_plan(entry.plan(layer))
        except (SchemaError, RecipeError) as error:
            raise BundleError(f"quantization_config: {error}; the folder is damaged") from error
        return found


def save_diffusers(
    quantized: fx.GraphModule | str | os.PathLike[str], model: nn.Module, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Write a folder for ``type(model).from_pretrained`` after ``fxq.register()``.

    Args:
        quantized: made by :func:`fxq.quantize` or :func:`fxq.load` from the model, or a bundle's folder.
        model: the diffusers model that was quantized, with its float weights: gives the configuration and the tensors
            that the captured call does not use. One from :func:`~fxq.models.diffusers_folder.load_folder` is mapped.
        path: the folder; an older one of the same content is replaced.

    Returns:
        The folder, of ``config.json`` and ``diffusion_pytorch_model.safetensors``.

    Raises:
        BundleError: the model is no diffusers model or another one, a layer is not an ``nn.Linear`` of it or has a form
            that modules do not have, or the place is taken.
    """
    out = pathlib.Path(path).absolute()
    module = quantized if isinstance(quantized, fx.GraphModule) else load(quantized)
    try:
        config, tensors, receipt = _content(module, model)
    except ValueError as error:
        raise BundleError(f"cannot save {out}: {error}") from None
    with whole_folder(out, (CONFIG, WEIGHTS), "a diffusers model") as folder:
        write_tensors(tensors, folder / WEIGHTS, receipt.to_header() | {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return out


def _content(module: fx.GraphModule, model: nn.Module) -> tuple[dict[str, object], dict[str, Tensor], Receipt]:
    """The configuration, the tensors and the receipt of a quantized model."""
    configuration = getattr(model, "to_json_string", None)
    if configuration is None:
        raise ValueError(f"the model is {type(model).__name__}, expected one of diffusers with a configuration")
    facts, notes = Facts.of(module), planned(module)
    plans = {layer: plan for layer, (plan, _) in notes.items()}
    if facts.optimized:
        raise ValueError("the module is optimized for this machine; give the one it was made from")
    if reason := told_in_graph(plans.values(), "a diffusers folder"):
        raise ValueError(reason)
    _refuse_tied(model)
    linears = {name: child for name, child in model.named_modules() if type(child) is nn.Linear}
    entries = {layer: LinearEntry.of(plan) for layer, plan in plans.items() if plan.scheme is not None}
    if not entries:
        raise ValueError("it has no quantized layer; there is nothing to store as integers")
    tensors: dict[str, Tensor] = {}
    for layer, entry in entries.items():
        stored = {name: get_tensor(module, f"{layer}.{name}") for name in entry.empty_tensors()}
        _check_reader(layer, notes[layer][1])
        _check_layer(linears.get(layer), plans[layer], stored)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in stored.items()}
    tensors |= _float_tensors(module, model, entries)
    kept = {layer: plan.reason for layer, plan in plans.items() if plan.scheme is None}
    kept |= {layer: "the captured call does not use it" for layer in facts.never_called}
    receipt = make_receipt(__version__, facts, plans.values(), {})
    quantization = QuantizationConfig(layers=entries, kept=kept, receipt=receipt, fxq_version=__version__)
    config = json.loads(configuration()) | {"quantization_config": quantization.to_json()}
    config.pop("_name_or_path", None)
    return config, tensors, receipt


def _check_reader(layer: str, nodes: Iterable[fx.Node]) -> None:
    """Refuse a layer whose weight is read by the code of a module around it: that code would find no weight."""
    for node in nodes:
        reader = module_path(node)
        if reader and layer.startswith(f"{reader}."):
            raise ValueError(
                f"layer {layer} is never called, {reader} reads its weight itself; exclude the layer by a rule"
            )


def _check_layer(linear: nn.Linear | None, plan: LayerPlan, stored: Mapping[str, Tensor]) -> None:
    """Make sure that a layer is a plain linear of the model and that its integers were made from that weight."""
    if linear is None:
        raise ValueError(f"layer {plan.layer} is no nn.Linear of the model; exclude it by a rule, or use fxq.save")
    if tuple(linear.weight.shape) != (plan.out_features, plan.in_features):
        raise ValueError(
            f"layer {plan.layer} is ({plan.out_features}, {plan.in_features}), the model's weight "
            f"{tuple(linear.weight.shape)}; give the model that was quantized"
        )
    if beside := sorted({*linear.state_dict()} - {"weight", "bias"}):
        raise ValueError(
            f"layer {plan.layer} has a tensor {beside[0]} beside weight and bias, for which the folder has no place; "
            "exclude the layer by a rule, or use fxq.save"
        )
    if not (apart := _deviation(linear.weight, plan, stored)) <= MOST_DEVIATION:
        raise ValueError(
            f"layer {plan.layer}: the model's weight is {apart:.3g} steps from the integers, at most "
            f"{MOST_DEVIATION:g} is rounding: give the model that was quantized. If the recipe changes weights before "
            "rounding, use fxq.save"
        )


def _deviation(weight: Tensor, plan: LayerPlan, stored: Mapping[str, Tensor]) -> float:
    """Root-mean-square distance of a float weight [N, K] from the integers in steps; clipped ones do not count."""
    scheme = plan.quantization
    codes, scale = fxq.numerics.unpacked(stored["weight"].cpu(), scheme.code_bits), stored["weight_scale"].cpu()
    ordered = weight.detach().to("cpu", torch.float32)
    ordered = ordered[:, stored["perm"].cpu()] if "perm" in stored else ordered
    return deviation_in_steps(ordered, codes, scale, plan.split, scheme.weight_bits, group_steps(scheme, codes))


def _refuse_tied(model: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise ValueError(f"{name} and {first} are one parameter of the model; such models need fxq.save")


def _float_tensors(module: fx.GraphModule, model: nn.Module, entries: Mapping[str, LinearEntry]) -> dict[str, Tensor]:
    """What stays in model dtype: the graph's tensors, and the model's where the captured call reads none."""
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    state = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in entries}
    tensors = {name: get_tensor(module, name) if name in read else tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(tensors[name].shape)} in the graph and {list(tensor.shape)} in the model; give the "
                "model that was quantized"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}
