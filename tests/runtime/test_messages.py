import pytest

from fxq.runtime.messages import close_names, did_you_mean, first_line, kind_and_line

KNOWN = ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.ffn", "head")


@pytest.mark.parametrize(
    ("error", "line", "both"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (KeyError("a"), "'a'", "KeyError: 'a'"),
        (RuntimeError("\n  first\nsecond\n"), "first", "RuntimeError: first"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (OSError("   "), "OSError", "OSError"),
    ],
)
def test_of_an_error_the_first_line_is_told_or_else_its_kind(error, line, both):
    assert first_line(error) == line and kind_and_line(error) == both


def test_a_long_line_is_cut():
    assert first_line(ValueError("abcdef\nx"), 3) == "abc" and first_line(ValueError("ab"), 3) == "ab"


@pytest.mark.parametrize("name", ["blocks.0.atn.q", "re:blocks.0.atn.q"])
def test_close_names_are_three_at_most_and_the_closest_first(name):
    told = close_names(name, KNOWN)
    assert told.startswith("close names: blocks.0.attn.q, blocks.0.attn.k") and told.count(",") <= 2


def test_names_that_resemble_nothing_have_no_proposal():
    assert close_names("zzz", KNOWN) == did_you_mean("zzz", KNOWN) == did_you_mean("x", ()) == ""


def test_one_name_is_proposed_and_only_when_it_is_close_enough():
    assert did_you_mean("hed", iter(KNOWN)) == "did you mean 'head'?"
    assert did_you_mean("hed", KNOWN, cutoff=0.99) == ""
