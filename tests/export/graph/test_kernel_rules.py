"""What kernels refuse and tensors without data take."""

import pytest
import torch

from fxq.export.graph.kernel_rules import misfit

ATEN = torch.ops.aten
X = torch.randn(2, 3)

CALLS = [
    (ATEN._softmax.default, (X, 255, False), {}),
    (ATEN._log_softmax.default, (X, -3, False), {}),
    (ATEN.softmax.int, (X, 2), {}),
    (ATEN.sort.default, (X, 2), {}),
    (ATEN.sort.stable, (X,), {"stable": True, "dim": 7}),
    (ATEN.argsort.default, (X, -4), {}),
    (ATEN.select_scatter.default, (X, torch.randn(2), 2, 0), {}),
    (ATEN.select_scatter.default, (X, torch.randn(2), 1, 3), {}),
    (ATEN.slice_scatter.default, (X, X, 5), {}),
    (ATEN.diagonal_scatter.default, (X, torch.randn(2), 0, 0, 4), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CALLS)])
def test_an_axis_or_index_that_is_not_there_is_refused_as_the_kernel_does(func, args, kwargs):
    with pytest.raises((IndexError, RuntimeError)):
        func(*args, **kwargs)
    assert str(func) in misfit(func, args, kwargs)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (ATEN.slice_scatter.default, (X, X, 1, 0, 1)),
        (ATEN.slice_scatter.default, (X, X[0], 0, 0, 1)),
        (ATEN.select_scatter.default, (X, X, 0, 0)),
        (ATEN.select_scatter.default, (X, torch.randn(X.shape[1] + 1), 0, 0)),
        (ATEN.diagonal_scatter.default, (X, torch.randn(1))),
    ],
)
def test_a_source_of_another_size_is_refused_as_the_kernel_does(func, args):
    with pytest.raises(RuntimeError):
        func(*args)
    assert f"{func}: a source of size" in misfit(func, args, {})


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (ATEN.slice_scatter.default, (X, X[:, :1], 1, 0, 1)),
        (ATEN.diagonal_scatter.default, (X, X.diagonal().clone())),
        (ATEN._softmax.default, (X, -2, False)),
        (ATEN.softmax.int, (torch.tensor(1.0), 0)),
        (ATEN.sort.default, (X,)),
        (ATEN.select_scatter.default, (X, torch.randn(2), 1, -3)),
        (ATEN.slice_scatter.default, (X, X, 0)),
    ],
)
def test_what_the_kernel_takes_is_let_through(func, args):
    func(*args)
    assert misfit(func, args, {}) == ""
