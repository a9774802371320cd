"""Standard streams that are missing, closed, of a narrow encoding, or no streams at all."""

import io
import sys
import warnings

import pytest

from fxq.runtime.streams import as_text, emit, finish_output, is_terminal, stderr_console, stdout_console, warn


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Odd:
    """Only writes, and cannot tell what it is."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def isatty(self):
        raise ZeroDivisionError


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError

    def fileno(self):
        raise OSError("closed")


@pytest.mark.parametrize(
    ("stream", "terminal"), [(Terminal(), True), (io.StringIO(), False), (Odd(), False), (None, False), (3, False)]
)
def test_what_cannot_tell_is_no_terminal(stream, terminal):
    assert is_terminal(stream) is terminal


def test_a_result_goes_to_the_stream_of_the_moment(monkeypatch):
    console = stdout_console()
    for stream in (io.StringIO(), Odd()):
        monkeypatch.setattr(sys, "stdout", stream)
        emit("a result")
        console.print("and a table")
        text = stream.text if isinstance(stream, Odd) else stream.getvalue()
        assert text.startswith("a result\n") and "and a table" in text


def test_characters_that_a_stream_cannot_encode_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    emit("7 µs")
    assert finish_output() and raw.getvalue() == b"7 \\xb5s\n"


def test_tables_have_their_width_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert stdout_console().width == 160 and stdout_console(width=70).width == 70


@pytest.mark.parametrize("stream", [None, Gone()])
def test_what_nobody_listens_to_on_standard_error_is_lost(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    stderr_console().print("lost")


def test_a_result_that_nobody_takes_is_an_error_and_the_end_of_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        emit("a result")
    assert finish_output() is False


def test_without_standard_output_results_are_dropped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    emit("a result")
    assert finish_output() is True


def test_a_warning_names_the_caller_and_outlives_a_broken_stream(monkeypatch):
    with pytest.warns(UserWarning, match="careful") as caught:
        warn("careful")
    assert caught[0].filename == __file__

    def closed(*args, **kwargs):
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(warnings, "warn", closed)
    warn("careful")


def test_a_warning_that_is_to_be_an_error_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="careful"):
            warn("careful")


@pytest.mark.parametrize(("stream", "width"), [(Terminal(), 60), (io.StringIO(), 140)])
def test_texts_of_results_are_as_wide_as_the_terminal_and_have_no_colours(monkeypatch, stream, width):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", stream)
    lines = as_text("[bold]" + "word " * 100).splitlines()
    assert width - 5 <= max(map(len, lines)) <= width and "\x1b" not in "".join(lines)
