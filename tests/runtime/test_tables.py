import re

import pytest
from rich.console import Console
from rich.table import Table

from fxq.runtime.tables import Sheet, Uncut, grouped

LAYERS = [f"blocks.{i}.{part}" for i in range(3) for part in ("self_attn.q", "self_attn.k", "ffn.0")]
REASON = "see [notes] in [/home/x]: no scale fits, and it stays as it is"


def sheet():
    made = Sheet("3 layers [bold]", {"layer": "left", "bits": "left", "SQNR dB": "right"}, "note")
    for i, layer in enumerate(LAYERS):
        made.add(layer, "W8A8 per token, asymmetric", f"{41.25 + i:.3f}", note=REASON if i % 2 else "")
    return made


def shown(width, made=None):
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(made or sheet())
    return capture.get()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_nothing_is_cut_and_brackets_stay(width):
    text = shown(width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    if width >= 60:  # below, cells are broken over lines
        joined = re.sub(r"[\s│┃]", "", text)
        assert all(word in joined for word in ("41.250", "49.250", REASON.replace(" ", ""), "[bold]"))


@pytest.mark.parametrize("width", [60, 90, 120, 200])
def test_numbers_are_not_cut_for_long_names(width):
    table = Table()
    for name in ("method", *(f"number {i}\nof four" for i in range(4))):
        table.add_column(name)
    name = "least_error:max_rows=16384,all_rows=true,weighting=gradient"
    table.add_row(name, "0.000157", "1.58 (1.50 to 1.67)", "0.00318", "41.4")
    text = shown(width, Uncut(table))
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    if width > 60:
        assert all(number in text for number in ("0.000157", "1.58 (1.50 to 1.67)", "0.00318", "41.4"))
    first = "".join(line[1:].split("│")[0].strip() for line in text.splitlines() if line.startswith("│"))
    assert first == name


@pytest.mark.parametrize(("width", "beside"), [(60, False), (80, False), (140, True)])
def test_notes_stand_beside_the_cells_or_once_below(width, beside):
    text = shown(width)
    assert all(re.search(rf"{re.escape(layer)}\b.*W8A8", text) for layer in LAYERS)
    below = re.sub(r"\s+", " ", text)
    assert (f"{REASON}: {LAYERS[1]}, {LAYERS[3]}, {LAYERS[5]} and 1 more" in below) != beside


def test_each_text_is_said_once_with_its_places():
    assert grouped([("a", "x"), ("b", "y"), ("c", "x"), ("a", "x")]) == "x: a, c\nb: y"
    assert grouped([]) == ""
