import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.graph import linear_sites
from fxq.trace import TraceError, trace
from tests.toys import rows, toy

X = rows(5, 64)


class Small(nn.Module):
    """One linear under a forward given as a function of (self, x)."""

    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("count", torch.zeros(3))
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def traced(forward):
    return trace(Small(forward).eval(), (X,))


def test_linears_stay_and_the_graph_computes_what_eager_does():
    model = toy()
    graph = trace(model, (rows(3, 96),))
    assert [site.layer for site in linear_sites(graph.module)] == ["blocks.0.up", "blocks.0.down", "head"]
    x = rows(3, 96, seed=9)
    assert torch.equal(graph.module(x), model(x))


def test_an_exported_program_is_taken_as_it_is():
    program = torch.export.export(toy(), (rows(3, 96),))
    assert len(list(linear_sites(trace(program, (rows(3, 96),)).module))) == 3


def branch(self, x):
    return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_a_data_dependent_branch_is_refused_with_the_reason():
    with pytest.raises(TraceError, match=r"cannot capture Small: .*data-dependent.*free of data-dependent"):
        traced(branch)


def test_randomness_in_training_mode_is_refused_with_the_remedy():
    with pytest.raises(TraceError, match=r"differs from eager .* in training mode; call \.eval\(\) first"):
        trace(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)), (X,))


def test_randomness_in_eval_mode_is_refused():
    with pytest.raises(TraceError, match="Hidden state or randomness in forward"):
        traced(lambda self, x: self.linear(x) + torch.rand_like(x))


def count_up(self, x):
    self.count.add_(1)
    return self.linear(x) * self.count[0]


def test_a_forward_that_writes_a_buffer_is_refused_and_the_buffer_restored():
    model = Small(count_up).eval()
    with pytest.raises(TraceError, match="the forward writes to buffer count: a call would change the model"):
        trace(model, (X,))
    assert torch.equal(model.count, torch.zeros(3))


def test_batch_norm_in_training_mode_is_refused_and_its_statistics_restored():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    with pytest.raises(TraceError, match=r"buffer 1\.running_mean.*call \.eval\(\) first"):
        trace(model, (X,))
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    trace(model.eval(), (X,))


def test_example_inputs_are_not_changed():
    x = X.clone()
    traced_graph = trace(Small(lambda self, x: self.linear(x.add_(1))).eval(), (x,))
    assert torch.equal(x, X) and traced_graph.module is not None


def under_no_grad(self, x):
    with torch.no_grad():
        y = self.linear(x) + self.count[0]
        z = y * 2
    return F.relu(self.linear(y)) + z


def under_enable_grad(self, x):
    with torch.no_grad():
        y = self.linear(x)
        with torch.enable_grad():
            y = self.linear(y) + torch.tensor(1.5)
    return y


@pytest.mark.parametrize("forward", [under_no_grad, under_enable_grad], ids=["no_grad", "nested"])
@pytest.mark.parametrize("exported", [False, True], ids=["module", "program"])
def test_linears_under_gradient_modes_are_seen(forward, exported):
    model = Small(forward).eval()
    graph = trace(torch.export.export(model, (X,)) if exported else model, (X,))
    assert [site.layer for site in linear_sites(graph.module)] == ["linear", "linear"]
    assert torch.equal(graph.module(X + 1), model(X + 1))
    assert "higher_order" not in graph.module.code


def under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)


def under_cond(self, x):
    return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: -self.linear(x), (x,))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (under_autocast, r"region wrap_with_autocast .*cast the model with \.to\(dtype\)"),
        (under_cond, "region cond .*choose the branch outside the model"),
    ],
)
def test_a_region_that_hides_linears_is_refused_with_a_remedy(forward, message):
    with pytest.raises(TraceError, match=message):
        traced(forward)


def test_an_example_of_the_wrong_shape_is_refused():
    with pytest.raises(TraceError, match="cannot capture Toy"):
        trace(toy(), (rows(3, 95),))
