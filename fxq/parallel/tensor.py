"""Tensor-parallel graphs: from a quantized module in memory, or from a bundle of which a rank reads its part."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from fxq.core.facts import Facts
from fxq.core.ir import QuantGraph, get_tensor
from fxq.core.pipeline import run_passes
from fxq.core.signature import guard_inputs, input_sizes
from fxq.dtypes import DTYPES
from fxq.export.bundle import TENSORS, Manifest, check_files, narrow_plans, read_graph, read_manifest
from fxq.export.files import BundleError, check_header
from fxq.export.inputs import record_values
from fxq.parallel.groups import Place, default_name, place_in
from fxq.parallel.layers import Sliceable, Slices
from fxq.parallel.plan import ParallelError, ShardPlan
from fxq.parallel.shard_graph import ShardGraph, Source


def tensor_parallel(module: fx.GraphModule, plan: ShardPlan, group: dist.ProcessGroup | None = None) -> fx.GraphModule:
    """This rank's part of a quantized module; every rank calls it, and the result, with equal inputs.

    Args:
        module: of :func:`fxq.quantize` or :func:`fxq.load`, not changed; tensors that are not split are shared with it.
        plan: which linears are split.
        group: the ranks; the default group if None.

    Returns:
        A module with the same signature, whose caches hold the rank's heads and whose other results are whole. It can
        go through :func:`fxq.optimize`; it cannot be saved.

    Raises:
        ParallelError: when there is no process group, or the plan does not fit the module or the number of ranks.
        ValueError: when the module was not made by fxq.
    """
    facts = Facts.of(module)
    if facts.optimized or facts.parallel is not None:
        done = "optimized" if facts.optimized else "split over ranks"
        raise ParallelError(f"this module is {done} already; give the one that fxq.quantize or fxq.load made")
    graph = QuantGraph.of(module).fork()
    return _split(graph, plan, place_in(group), ModuleSource(module))


def load_shard(
    path: str | os.PathLike[str],
    plan: ShardPlan,
    rank: int,
    size: int,
    *,
    group: str | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> fx.GraphModule:
    """Load a rank's part of a bundle, as :func:`tensor_parallel` makes it.

    Of a split tensor only the rank's part is copied into memory; the first rank reads row layers whole, one by one, as
    its offset needs the zero points of the other ranks.

    Args:
        path: folder written by :func:`fxq.save`.
        plan: which linears are split.
        rank: 0..size - 1.
        size: number of ranks.
        group: name of the process group that runs the sums (``ProcessGroup.group_name``); the default group if None.
        device: where tensors go.
        verify: compare the hash of the tensor file, which reads all of it once. Without it damaged values stay unseen;
            truncation does not.

    Raises:
        BundleError: as :func:`fxq.load`.
        ParallelError: when the plan does not fit the model or the number of ranks.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hash_tensors=verify)
    if manifest.inputs is None:
        raise ParallelError(f"{folder} does not state its inputs (an older bundle): load it and save it again")
    if narrow := narrow_plans(manifest):
        raise ParallelError(
            f"{folder}: the weight of {narrow[0].layer} is {narrow[0].quantization.label}, which a file holds in bit "
            "planes: load it whole (fxq.load) and split it by tensor_parallel"
        )
    place = Place(default_name() if group is None else group, rank, size)
    check_header(folder / TENSORS, folder, {name: (e.dtype, e.shape) for name, e in manifest.tensors.items()})
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            source = _FileSource(file, manifest, torch.device(device))
            graph = QuantGraph.of(_skeleton(folder, manifest, torch.device(device)))
            return _split(graph, plan, place, source)
    except SafetensorError as error:
        raise BundleError(f"{folder / TENSORS} cannot be read: {error}") from None


def _split(graph: QuantGraph, plan: ShardPlan, place: Place, source: Source) -> fx.GraphModule:
    run_passes(graph, (ShardGraph(plan, place, source),))
    own = {"rank": place.rank, "size": place.size, "plan": dataclasses.asdict(plan)}
    facts = Facts.of(graph.module).after(graph)
    dataclasses.replace(facts, inputs=input_sizes(graph.module), parallel=own).attach(graph.module)
    return guard_inputs(graph.module)


def _skeleton(folder: pathlib.Path, manifest: Manifest, device: torch.device) -> fx.GraphModule:
    """The bundle's graph with recorded values; its tensors are zeros without memory of their own."""
    zeros = {
        name: torch.zeros((), dtype=DTYPES[entry.dtype], device=device).expand(entry.shape)
        for name, entry in manifest.tensors.items()
    }
    module = read_graph(folder, manifest, zeros, device, values=False)
    assert manifest.inputs is not None
    record_values(module, manifest.inputs, device)
    return module


@dataclasses.dataclass(frozen=True)
class ModuleSource:
    """The tensors of a module, not copied."""

    module: fx.GraphModule

    def whole(self, name: str) -> Tensor:
        """A tensor."""
        return get_tensor(self.module, name)

    def part(self, name: str) -> Sliceable:
        """A tensor, to be sliced."""
        return get_tensor(self.module, name).detach()


@dataclasses.dataclass(frozen=True)
class _FileSource:
    """The tensors of an open safetensors file; their dtypes are compared with the manifest's."""

    file: Any
    manifest: Manifest
    device: torch.device

    def whole(self, name: str) -> Tensor:
        return self.part(name)[...]

    def part(self, name: str) -> Sliceable:
        dtype = DTYPES[self.manifest.tensors[name].dtype]
        return _FilePart(name, self.file.get_slice(name), dtype, self.device)


@dataclasses.dataclass(frozen=True)
class _FilePart:
    name: str
    stored: Any
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, index: Slices) -> Tensor:
        tensor: Tensor = self.stored[index]
        if tensor.dtype != self.dtype:
            raise BundleError(f"tensor {self.name} is {tensor.dtype}, the manifest says {self.dtype}")
        # A copy even on the CPU: what is sliced is a view of the whole file in memory.
        return tensor.to(self.device, copy=True, memory_format=torch.contiguous_format)
