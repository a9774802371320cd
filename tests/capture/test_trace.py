import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.capture.trace import TraceError, trace
from fxq.core.graph import linear_sites
from fxq.core.ir import example_value
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
        y = torch.softmax(self.linear(x), -1)
        with torch.autocast("cpu", enabled=False):
            y = self.linear(y.float())
        y = self.linear(y) @ y.T
    return y, self.linear(x)


def without_autocast(self, x):
    with torch.autocast("cuda", enabled=False):
        y = self.linear(x.float()) + self.count[0]
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        y, z = self.linear(y).chunk(2)
    return y, z


@pytest.mark.parametrize("forward", [under_autocast, without_autocast])
@pytest.mark.parametrize("exported", [False, True], ids=["module", "program"])
def test_linears_under_autocast_are_seen_and_cast_as_autocast_does(forward, exported):
    model, x = Small(forward).eval(), rows(6, 64)
    graph = trace(torch.export.export(model, (x,)) if exported else model, (x,))
    sites = list(linear_sites(graph.module))
    assert [site.weight_name for site in sites] == ["linear.weight"] * (4 if forward is under_autocast else 2)
    for got, want in zip(graph.module(x + 1), model(x + 1), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert "higher_order" not in graph.module.code


def under_cond(self, x):
    return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: -self.linear(x), (x,))


def test_a_region_that_hides_linears_is_refused_with_the_line_and_a_remedy():
    with pytest.raises(
        TraceError, match=r"region cond .* at test_trace\.py:\d+ `return torch\.cond.*: choose the branch"
    ):
        traced(under_cond)


def with_numpy(self, x):
    return self.linear(torch.from_numpy(x.numpy() * 2))


def test_what_only_the_bytecode_form_can_capture_is_captured_by_it():
    model = Small(with_numpy).eval()
    graph = trace(model, (X,))
    assert [site.layer for site in linear_sites(graph.module)] == ["linear"]
    assert torch.equal(graph.module(X + 1), model(X + 1))


def write_through_data(self, x):
    table = torch.zeros(64)
    table.data[3:].copy_(self.linear.bias[3:])
    return self.linear(x) + table


def test_a_lost_write_is_refused_with_its_line():
    with pytest.raises(
        TraceError, match=r"through \.data is lost in capture: test_trace\.py:\d+ `table\.data\[3:\]\.copy_"
    ):
        traced(write_through_data)


def test_two_reasons_at_one_line_are_told_once():
    with pytest.raises(TraceError) as refusal:
        traced(branch)
    assert re.search(r"at test_trace\.py:\d+ `return self\.linear\(x\) if x\.sum\(\) > 0", str(refusal.value))
    assert str(refusal.value).count("torch.export cannot capture") == 1


def keep_a_table(self, x):
    if not hasattr(self, "table"):
        self.table = torch.arange(64.0).cos()
    return self.linear(x) * self.table


def test_what_a_forward_makes_once_and_keeps_has_values_afterwards():
    model = Small(keep_a_table).eval()
    graph = trace(model, (X,))
    assert type(model.table) is torch.Tensor
    assert torch.equal(graph.module(X + 1), model(X + 1))


def turn(self, x):
    table = self.turns.conj()[None, :, None] if hasattr(self, "turns") else None
    pairs = torch.view_as_complex(self.linear(x).unflatten(-1, (4, 8, 2)))
    return torch.view_as_real(pairs * table * self.turns[0]).flatten(1)


def test_complex_constants_are_held_as_real_ones():
    model = Small(turn).eval()
    model.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
    graph = trace(model, (X,))
    assert torch.equal(graph.module(X + 1), model(X + 1))
    assert graph.module.turns.dtype == torch.float32 and tuple(graph.module.turns.shape) == (4, 2)
    held = [example_value(node) for node in graph.module.graph.find_nodes(op="get_attr")]
    assert len(held) >= 3 and not any(value.is_complex() for value in held)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_seen_through(wrap):
    graph = trace(wrap(toy()), (rows(3, 96),))
    assert [site.layer for site in linear_sites(graph.module)] == ["blocks.0.up", "blocks.0.down", "head"]


def test_a_model_that_does_not_run_is_told_from_one_that_cannot_be_captured():
    with pytest.raises(
        TraceError, match=r"it does not run on the example inputs: .*shapes cannot be multiplied.*, at toys\.py:\d+ `"
    ):
        trace(toy(), (rows(3, 95),))


def test_an_example_of_the_wrong_shape_is_refused():
    with pytest.raises(TraceError, match="cannot capture Toy"):
        trace(toy(), (rows(3, 95),))


def test_torch_does_not_talk_about_dimensions_that_it_fixed(caplog):
    one = torch.randn(1, 8)
    shapes = {"input": {0: torch.export.Dim.AUTO}}
    trace(nn.Linear(8, 4), (one,), None, shapes)
    assert "specialized" not in caplog.text
    torch.export.export(nn.Linear(8, 4), (one,), dynamic_shapes=shapes)
    assert "specialized" in caplog.text


def test_a_working_directory_that_is_gone_is_told_as_it_is(tmp_path, monkeypatch):
    def gone(*args, **options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(torch.export, "export", gone)
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        trace(torch.nn.Linear(8, 8).eval(), (torch.zeros(2, 8),))
