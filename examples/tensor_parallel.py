"""One quantized model on two processes: linears split over ranks, then tokens split over ranks.

python examples/tensor_parallel.py                                             # starts two processes on this machine
torchrun --nproc-per-node 2 examples/tensor_parallel.py                        # the same, started by torchrun

On GPUs: ``init_process_group("nccl")``, ``torch.cuda.set_device(local rank)`` and ``load_shard(..., device="cuda")``.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist

import fxq
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.parallel import CAUSAL_WAN, load_shard, local_rollout, ulysses

CONFIG = CausalWanConfig(
    dim=128, ffn_dim=256, num_heads=4, num_layers=1, freq_dim=32, text_dim=32, text_len=5, in_dim=4, out_dim=4
)
PROCESSES = 2


def make_rollout() -> SelfForcingRollout:
    """Two videos of a small untrained model, the same on every rank."""
    torch.manual_seed(0)
    model = CausalWan(CONFIG).eval().requires_grad_(False)
    prompts = torch.randn(2, CONFIG.text_len, CONFIG.text_dim)
    batch = ({"prompt_embeds": prompts}, fxq.Draws((1, 2), (6, CONFIG.in_dim, 8, 8)))
    return SelfForcingRollout(model, [batch], SamplerConfig(steps=(1000, 500), frames_per_chunk=3))


def stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of the tensors of a module's blocks."""
    return sum(tensor.nbytes for name, tensor in module.state_dict().items() if name.startswith("blocks."))


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error."""
    return ((got - want).norm() / want.norm()).item()


def run_rank(folder: pathlib.Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    rollout = make_rollout()
    if rank == 0:
        recipe = dataclasses.replace(fxq.PRESETS["w4a8"], methods=fxq.PRESETS["w4a8"].methods[:1])
        fxq.save(fxq.quantize(rollout.denoiser, rollout, recipe, progress=False), folder)
    dist.barrier()

    whole = fxq.load(folder)
    with rollout.using(whole):
        want = rollout.rollout(*rollout.batches[0])

    shard = load_shard(folder, CAUSAL_WAN, rank, size)
    local = local_rollout(rollout, size)
    with local.using(fxq.optimize(shard)):
        by_layers = local.rollout(*local.batches[0])
    with local.using(ulysses(fxq.apply(rollout.model, folder))):
        by_tokens = local.rollout(*local.batches[0])

    if rank == 0:
        print(f"bytes of the blocks on a rank {stored_bytes(shard)} of {stored_bytes(whole)}")
        print(f"linears split: relative error {distance(by_layers, want):.1e}")
        print(f"tokens split: relative error {distance(by_tokens, want):.1e}")


def main() -> None:
    """Run as a rank, or start the ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        run_rank(pathlib.Path(os.environ.get("FXQ_BUNDLE", "out/tensor_parallel")))
        dist.destroy_process_group()  # after the modules, which hold the group, are gone
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
        environment = os.environ | {"FXQ_BUNDLE": str(pathlib.Path(folder) / "bundle")}
        subprocess.run([sys.executable, *command], env=environment, check=True)


if __name__ == "__main__":
    main()
