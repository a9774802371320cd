"""Frozen graphs of small modules, and what a fusion made of them."""

import torch

import fxq
from fxq.core.config import Recipe, Rule, Scheme
from fxq.core.ir import QuantGraph, Stage
from fxq.core.pipeline import run_passes
from tests.toys import QUICK


def recipe_of(**scheme):
    """Every linear is quantized, with one scale unless told otherwise."""
    rules = (Rule("*", Scheme(**{"dual_scale": False, **scheme})),)
    return Recipe(name="fusing", rules=rules, methods=QUICK, weighting="uniform")


def frozen(model, args, **scheme):
    """The quantized module; the first dimension of every input may vary where the model allows it."""
    return fxq.quantize(model.eval(), [args], recipe_of(**scheme), progress=False)


def fused(module, *passes):
    """A fork of a frozen module after the passes."""
    return run_passes(QuantGraph(module, Stage.FROZEN).fork(), passes)


def count(graph, name):
    """Number of nodes that call an operator, as ``fxq.attention`` or ``aten.cat``."""
    nodes = graph.module.graph.nodes
    return sum(node.op == "call_function" and str(node.target).startswith(f"{name}.") for node in nodes)


def error(graph, module, *args):
    """Relative error of a graph against a module; dtypes and shapes are the same."""
    with torch.no_grad():
        got, want = graph.module(*args), module(*args)
    assert got.dtype == want.dtype and got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def remarks(graph):
    """All remarks and notes as one text."""
    return "\n".join(f"{layer}: {text}" for layer, texts in (graph.remarks | graph.notes).items() for text in texts)
