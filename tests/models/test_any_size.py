"""One graph for frames of any height and width."""

import pytest
import torch

import fxq
from fxq.calibration.rollout import Draws
from fxq.models.self_forcing import SelfForcingRollout
from tests.toys import recipe, wan_rollout

SIZES = ((4, 6), (8, 10), (2, 14))


def rollouts(height, width):
    """The toy at a size, captured for it and for any."""
    small = wan_rollout()
    draws = Draws((1, 2), (6, 3, height, width))
    batches = [(small.batches[0][0], draws)]
    return [SelfForcingRollout(small.model, batches, small.sampler, any_size=any_size) for any_size in (False, True)]


def video(rollout, module):
    with rollout.using(module):
        return rollout.rollout(*rollout.batches[0])


@pytest.fixture(
    scope="module",
    params=[(8, False), *(pytest.param(p, marks=pytest.mark.sweep) for p in ((4, False), (8, True)))],
    ids=["w8", "w4", "w8-per-token"],
)
def free(request):
    """A module calibrated at one size, captured for any."""
    bits, per_token = request.param
    rollout = rollouts(*SIZES[0])[1]
    chosen = recipe(bits, per_token=per_token)
    return fxq.quantize(rollout.denoiser, rollout, chosen, progress=False), chosen


@pytest.fixture(scope="module")
def fixed(free):
    """The same, captured for the calibrated size."""
    rollout = rollouts(*SIZES[0])[0]
    return fxq.quantize(rollout.denoiser, rollout, free[1], progress=False)


@pytest.fixture(scope="module")
def derived(free, tmp_path_factory):
    """The module of ``free`` saved and loaded, and both optimized."""
    loaded = fxq.load(fxq.save(free[0], tmp_path_factory.mktemp("any_size") / "bundle"))
    return loaded, (fxq.optimize(free[0]), fxq.optimize(loaded))


def test_at_the_calibrated_size_it_is_the_fixed_graph(free, fixed):
    module, rollout = free[0], rollouts(*SIZES[0])[0]
    assert torch.equal(video(rollout, module), video(rollout, fixed))


@pytest.mark.parametrize("size", SIZES)
def test_it_runs_at_every_size_also_loaded_and_optimized(free, derived, size):
    module, (loaded, optimized) = free[0], derived
    rollout = rollouts(*size)[0]
    want, got = video(rollout, rollout.denoiser), video(rollout, module)
    assert (want - got).norm() < 0.05 * want.norm()
    assert torch.equal(video(rollout, loaded), got)
    for fast in optimized:
        assert (video(rollout, fast) - got).norm() < 1e-3 * got.norm()  # a value on the border of two integers


def test_fusions_are_those_of_the_fixed_graph(derived, fixed):
    fast = derived[1][0], fxq.optimize(fixed)
    remarks = [{row.layer: row.remarks for row in fxq.summary(module).rows} for module in fast]
    assert remarks[0] == remarks[1]


def test_a_size_that_is_no_whole_patch_and_another_number_of_frames_are_refused(free):
    module, _ = free
    args, _ = rollouts(*SIZES[0])[0].example_call()
    with pytest.raises(ValueError, match=r"input x has shape \[2, 3, 3, 4, 6\]"):
        module(torch.zeros(2, 3, 3, 4, 6), *args[1:])


@pytest.mark.sweep
@pytest.mark.parametrize("free", [(8, False), (4, False)], indirect=True)
def test_onnx_keeps_the_freedom(free, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, _ = free
    fxq.export_onnx(module, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in SIZES[1:]:
        calls = []
        rollout = rollouts(*size)[0]
        video(rollout, lambda *args, calls=calls: (calls.append(args), module(*args))[1])
        leaves = torch.utils._pytree.tree_leaves(calls[3])
        feeds = {i.name: leaf.numpy() for i, leaf in zip(session.get_inputs(), leaves, strict=True)}
        want = torch.utils._pytree.tree_leaves(module(*calls[3]))
        for a, b in zip(session.run(None, feeds), want, strict=True):
            assert (torch.from_numpy(a) - b).norm() <= 0.01 * b.norm()
