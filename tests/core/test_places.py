"""Places of model code: in tracebacks, in texts, and where ``.data`` is read."""

import pathlib
import traceback

import pytest
import torch

from fxq.core.places import DataAccesses, is_model_code, place, place_of, quoted_place

HERE = str(pathlib.Path(__file__))
NAME = pathlib.Path(__file__).name


class Faulty(torch.nn.Module):
    def forward(self, x):
        return x.reshape(7)  # the place


def failure():
    try:
        Faulty()(torch.ones(3))
    except RuntimeError as error:
        return error
    return None


def test_a_place_shows_the_line():
    line = pathlib.Path(HERE).read_text().splitlines().index("class Faulty(torch.nn.Module):") + 1
    assert place(HERE, line) == f"{NAME}:{line} `class Faulty(torch.nn.Module):`"


@pytest.mark.parametrize(
    ("file", "own"),
    [
        (HERE, True),
        (torch.nn.__file__, False),
        (traceback.__file__, False),
        (pytest.__file__, True),
        ("<string>", False),
        ("<eval_with_key>.7", False),
    ],
)
def test_code_of_torch_python_and_generators_is_nobodys_model(file, own):
    assert is_model_code(file) is own


def test_the_place_of_an_error_is_the_innermost_line_that_torch_called():
    assert place_of(failure()).endswith("`return x.reshape(7)  # the place`")


def test_the_place_of_an_error_is_found_in_its_cause():
    try:
        raise ValueError("outside") from failure()
    except ValueError as error:
        assert "reshape(7)" in place_of(error)


def test_an_error_outside_of_a_model_has_no_place():
    try:
        raise ValueError("nowhere")
    except ValueError as error:
        assert place_of(error) == ""


def test_a_quoted_traceback_has_its_last_line_of_model_code():
    quoted = f'File "{HERE}", line 1, in f\n File "{HERE}", line 3, in g\n File "{torch.nn.__file__}", line 9, in h'
    assert quoted_place(quoted).startswith(f"{NAME}:3 ")
    assert place_of(ValueError(quoted)) == quoted_place(quoted)
    assert quoted_place("no traceback at all") == ""


def test_reads_of_data_are_noted_once_with_the_reader():
    x = torch.ones(2)
    with DataAccesses() as noted:
        for _ in range(2):
            x.data.add_(1)
        y = x + 1
    assert len(noted.places) == 1 and noted.places[0].endswith("`x.data.add_(1)`")
    assert torch.equal(y, torch.full((2,), 4.0))
