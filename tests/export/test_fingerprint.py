import copy
import dataclasses

import pytest
import torch

import fxq
from fxq.export.fingerprint import OLDEST_PROJECTIONS, compare_fingerprint, take_fingerprint
from fxq.export.inputs import input_entries
from tests.toys import recipe, rows, toy


@pytest.fixture(scope="module")
def saved():
    module = fxq.quantize(toy(), [rows(32, 96)], recipe(), progress=False)
    entries = input_entries(module)
    return module, entries, take_fingerprint(module, entries)


def moved(module, by, seed):
    """The module with its first output moved by a share of its norm, in a direction of chance."""

    def call(*args, **kwargs):
        out = module(*args, **kwargs)
        step = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        return out + step * (by * out.norm() / step.norm())

    return call


def test_a_module_has_its_own_fingerprint(saved):
    module, entries, recorded = saved
    assert compare_fingerprint(module, entries, recorded) == []


@pytest.mark.parametrize("seed", range(20))
def test_twice_the_tolerance_is_found_in_any_direction(saved, seed, monkeypatch):
    module, entries, recorded = saved
    other = moved(module, 2 * recorded.tolerance, seed)
    monkeypatch.setattr("fxq.export.fingerprint.call_flat", lambda m, inputs: [other(*inputs)])
    assert "differs by" in compare_fingerprint(module, entries, recorded)[0]


def test_what_kernels_may_differ_by_passes(saved, monkeypatch):
    module, entries, recorded = saved
    other = moved(module, recorded.tolerance / 10, 0)
    monkeypatch.setattr("fxq.export.fingerprint.call_flat", lambda m, inputs: [other(*inputs)])
    assert compare_fingerprint(module, entries, recorded) == []


def test_older_fingerprints_with_fewer_projections_are_compared(saved):
    module, entries, recorded = saved
    older = tuple(
        dataclasses.replace(mark, projections=mark.projections[:OLDEST_PROJECTIONS]) for mark in recorded.outputs
    )
    assert compare_fingerprint(module, entries, dataclasses.replace(recorded, outputs=older)) == []


def writing(module):
    """The module with a node at its end that doubles its input, which no output shows."""
    changed = copy.deepcopy(module)
    graph = changed.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.aten.mul_.Tensor, (graph.find_nodes(op="placeholder")[0], 2.0))
    changed.recompile()
    return changed


def test_a_write_into_an_input_is_a_difference(saved):
    module, entries, recorded = saved
    changed = writing(module)
    assert compare_fingerprint(changed, entries, recorded) == ["1 written tensors, recorded 0"]
    own = take_fingerprint(changed, entries)
    assert compare_fingerprint(changed, entries, own) == []
    assert compare_fingerprint(module, entries, own) == ["0 written tensors, recorded 1"]


def test_fingerprints_from_before_writes_were_recorded_are_compared(saved):
    module, entries, recorded = saved
    assert recorded.writes == ()
    older = dataclasses.replace(recorded, writes=None)
    assert compare_fingerprint(writing(module), entries, older) == []
