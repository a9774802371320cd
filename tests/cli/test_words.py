import pytest

from fxq.cli.models import AdapterError
from fxq.cli.words import parse_prompt
from fxq.metrics import sprites


def test_words_in_any_order_are_the_prompt():
    found = parse_prompt("column2 ring row1 red right black slow")
    assert found.shape == (1, 7) and sprites.describe(found[0]) == "ring red right slow black row1 column2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rign red right slow black row1 column2", "needs exactly one shape of: .*; for 'rign' did you mean 'ring'"),
        ("ring red blue right slow black row1 column2", "needs exactly one colour of"),
        ("", "needs exactly one"),
    ],
)
def test_a_field_with_no_word_or_two_is_refused(text, message):
    with pytest.raises(AdapterError, match=message):
        parse_prompt(text)
