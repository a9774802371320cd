"""Small models, recipes and problems shared by tests."""

import dataclasses

import torch
from torch import nn

from fxq.calibration.rollout import Draws
from fxq.capture.trace import trace
from fxq.core.config import Scheme
from fxq.core.ir import Stage
from fxq.core.pipeline import run_passes
from fxq.job import Job
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.passes.methods import LayerProblem, Units
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.grid import Grid
from fxq.passes.methods.quadratic import Quadratic
from fxq.passes.methods.ranges import RangeSearch
from fxq.presets import wan_recipe
from fxq.runtime.progress import Progress

QUICK = (RangeSearch((0.999, 1.0), (0.8, 1.0)),)
LEARN = (*QUICK, AdaRound(iterations=20, rows=16))


def recipe(bits=8, input_bits=8, methods=QUICK, weighting="uniform", **scheme):
    """The shipped rules with cheap methods."""
    chosen = Scheme(weight_bits=bits, input_bits=input_bits, **scheme)
    return wan_recipe(f"w{bits}a{input_bits}", chosen, methods=methods, weighting=weighting)


class Block(nn.Module):
    """Two linears with a GELU between and a residual; eight input channels of the first stand out."""

    def __init__(self, width, hidden, bias=True):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        with torch.no_grad():
            self.up.weight[:, 3:35:4] *= 6

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Toy(nn.Module):
    """Blocks (so that the outlier rule applies) and a head that the recipe keeps."""

    def __init__(self, width=96, hidden=64, outputs=7, blocks=1, bias=True):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden, bias) for _ in range(blocks))
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def toy(seed=1, **options):
    torch.manual_seed(seed)
    return Toy(**options).eval()


def rows(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(model, other, *args):
    with torch.no_grad():
        want, got = model(*args), other(*args)
    return float((want.double() - got.double()).norm() / want.double().norm())


WAN = CausalWanConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=1, freq_dim=16, text_dim=32, text_len=5, in_dim=3, out_dim=3
)


def wan_rollout(seeds=(1, 2), frames=6, config=WAN):
    torch.manual_seed(0)
    model = CausalWan(config).eval().requires_grad_(False)
    with torch.no_grad():
        model.blocks[0].self_attn.q.weight[:, 5:50:7] *= 5
    condition = {"prompt_embeds": torch.randn(len(seeds), 4, config.text_dim)}
    sampler = SamplerConfig(steps=(1000, 500), frames_per_chunk=2)
    return SelfForcingRollout(model, [(condition, Draws(seeds, (frames, config.in_dim, 4, 6)))], sampler)


def problem(outputs=13, width=96, count=200, outliers=0, seed=3, bits=4, input_bits=8, **scheme):
    """A layer whose last ``outliers`` input channels have large weights and inputs, correlated rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    x = torch.randn(count, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator) / 4
    if outliers:
        weight[:, -outliers:] *= 8
        x[:, -outliers:] *= 8
    return LayerProblem(
        layer="blocks.0.x",
        weight=weight,
        low=x.amin(0),
        high=x.amax(0),
        rows=x,
        row_weights=torch.ones(count),
        scheme=Scheme(weight_bits=bits, input_bits=input_bits, **scheme),
        split=width - outliers,
        seed=0,
    )


def steps(p, scale):
    """Value of one integer of each weight [N, K] of a problem, of scales [G, N] without multipliers."""
    return Grid(scale, p.split).steps(p.weight.shape[1])


def form_loss(p, update):
    """Quadratic form of a problem's integers and scales, for each output."""
    return Quadratic.of(p, update).loss(update.weight * steps(p, update.weight_scale / Units.of(p).weights))


def rewritten(model, transforms, data, **scheme):
    """The CALIBRATED float graph of a model after transforms."""
    chosen = dataclasses.replace(recipe(**scheme), transforms=tuple(transforms))
    graph, job = trace(model, (data[0],)), Job(chosen, Progress(False))
    job.plan(graph)
    job.calibrate(graph, data)
    return run_passes(graph, (step for step in transforms if step.needs is Stage.CALIBRATED))
