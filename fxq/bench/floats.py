"""The same module in float: eager, through inductor, and with linears by oneDNN on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxq.bench.contest import Built
from fxq.bench.problems import Problem
from fxq.cpu import no_bfloat16


def own_dtype(device: str) -> torch.dtype:
    """Dtype of the models that this library quantizes here: bfloat16, float32 on a CPU without kernels for it."""
    return torch.float32 if torch.device(device).type == "cpu" and no_bfloat16() else torch.bfloat16


def eager(problem: Problem, dtype: torch.dtype) -> Built:
    """The module as it is."""
    model, args = problem.model(dtype), problem.args(dtype)
    return Built(lambda: model(*args), "F.linear")


def compiled(problem: Problem, dtype: torch.dtype) -> Built:
    """The module through inductor."""
    run, args = torch.compile(problem.model(dtype), dynamic=False), problem.args(dtype)
    return Built(lambda: run(*args), "inductor, freezing")


class OneDnnLinear(nn.Module):
    """A float linear by oneDNN on packed weights; ``F.linear`` takes MKL for float32, which some CPUs run slowly."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight, None), linear.bias
        self.outputs = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N]."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.outputs)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def onednn_model(model: nn.Module) -> nn.Module:
    """The model with every linear replaced, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, OneDnnLinear(child))
    return model


def onednn(problem: Problem, dtype: torch.dtype) -> Built:
    """The module as it is but for its linears."""
    model, args = onednn_model(problem.model(dtype)), problem.args(dtype)
    return Built(lambda: model(*args), "oneDNN, packed")
