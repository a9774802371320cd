import dataclasses

import pytest
import torch
from torch import nn

from fxq.capture.trace import trace
from fxq.core.config import Recipe, RecipeError, Rule, Scheme
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes import PlanLayers, run_passes
from fxq.passes.match.roles import roles_of
from fxq.presets import PRESETS
from tests.toys import QUICK, rows, toy, wan_rollout

BY_ROLE = (
    Rule("*", None, "conditioning", role="conditioning", optional=True),
    Rule("*", None, "the last", role="last", optional=True),
)


def layers(module, role):
    return [layer for layer, roles in roles_of(module).items() if role in roles]


def kept(graph, rules):
    recipe = Recipe(name="r", rules=(*rules, Rule("*", Scheme())), methods=QUICK, weighting="uniform")
    fork = run_passes(graph.fork(), (PlanLayers(recipe),))
    return {layer for layer, plan in fork.plans.items() if plan.scheme is None}


class Wrapped(nn.Module):
    """A model under a name and a number."""

    def __init__(self, inner):
        super().__init__()
        self.models = nn.ModuleList([inner])

    def forward(self, *args):
        return self.models[0](*args)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["bare", "wrapped"])
def test_roles_name_what_the_presets_keep_of_a_wan_model(wrap):
    rollout = wan_rollout()
    args, shapes = rollout.example_call()
    shapes = shapes if wrap is not Wrapped else (tuple(shapes),)
    graph = trace(wrap(rollout.denoiser), args, None, shapes)
    prefix = "models.0." if wrap is Wrapped else ""
    want = {f"{prefix}{name}" for name in ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head")}
    assert kept(graph, BY_ROLE) == want == kept(graph, [r for r in PRESETS["w8a8"].rules if r.scheme is None])
    assert layers(graph.module, "first") == [f"{prefix}{name}" for name in ("time_embedding.0", "text_embedding.0")]


class Modulated(nn.Module):
    """Blocks that make their modulation of one vector, as DiT does, under names that say nothing."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)

        def forward(self, x, c):
            return x + self.b(x) * self.a(c)[:, None]

    def __init__(self):
        super().__init__()
        self.p, self.q, self.r = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(6, 16)
        self.s = nn.ModuleList(self.Block() for _ in range(2))
        self.z = nn.Linear(16, 6)

    def forward(self, x, t):
        c, x = self.q(torch.relu(self.p(t))), self.r(x)
        for block in self.s:
            x = block(x, c)
        return self.z(x)


def test_a_modulation_inside_a_block_is_part_of_the_block():
    module = trace(Modulated().eval(), (rows(2, 7, 6), rows(2, 5))).module
    assert layers(module, "conditioning") == ["p", "q"]
    assert layers(module, "first") == ["p", "r"] and layers(module, "last") == ["z"]


def test_a_model_without_a_token_axis_has_no_conditioning():
    module = trace(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).eval(), (rows(3, 6),)).module
    assert roles_of(module) == {"0": {"first"}, "2": {"last"}}


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(torch.relu(self.a(x)))


def test_a_layer_called_twice_has_the_roles_of_both_calls():
    assert roles_of(trace(Twice().eval(), (rows(3, 6),)).module) == {"a": frozenset()}


def test_named_rules_decide_before_rules_of_a_role():
    graph = trace(toy(), (rows(3, 96),))
    assert kept(graph, BY_ROLE) == {"head"}
    assert kept(graph, (*BY_ROLE, Rule("hea*", Scheme()))) == set()


def test_a_required_role_that_no_layer_has_is_refused():
    graph = trace(toy(), (rows(3, 96),))
    rule = dataclasses.replace(BY_ROLE[0], optional=False)
    with pytest.raises(RecipeError, match=r"no layer of pattern '\*' has the role 'conditioning' in this model"):
        kept(graph, (rule,))
    with pytest.raises(RecipeError, match=r"role 'lst': expected one of first, last, conditioning"):
        kept(graph, (Rule("*", None, role="lst"),))


def test_roles_of_the_shipped_model_are_those_of_its_names():
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=0, unseen=False)
    args, shapes = rollout.example_call()
    graph = trace(rollout.denoiser, args, None, shapes)
    assert kept(graph, BY_ROLE) == kept(graph, [r for r in PRESETS["w4a8"].rules if r.scheme is None])
    assert len(kept(graph, BY_ROLE)) == 4
