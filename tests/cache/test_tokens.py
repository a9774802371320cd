"""Growing memory: nothing that stays is copied, nothing that someone still reads is overwritten."""

import pytest
import torch

from fxq.cache.tokens import StaleError, Tokens, joined


def chunk(i, count=3):
    return torch.full((2, count, 1, 2), float(i))


def test_growing_copies_each_token_a_bounded_number_of_times():
    tokens = Tokens.of(chunk(0)[:, :0])
    for i in range(200):
        tokens = tokens.appended(chunk(i))
    assert torch.equal(tokens.tensor, torch.cat([chunk(i) for i in range(200)], dim=1))
    assert tokens.buffer.moved <= 3 * 200 * 3 * 16  # a new copy each time would be a hundred times the tokens' bytes
    assert 200 * 3 * 16 <= tokens.nbytes <= 1.6 * 200 * 3 * 16


def test_two_lines_from_one_do_not_meet():
    base = Tokens.of(chunk(0)).appended(chunk(1))
    left, right = base.appended(chunk(2)), base.appended(chunk(3))
    assert left.tensor[0, -1, 0, 0] == 2 and right.tensor[0, -1, 0, 0] == 3
    assert torch.equal(base.tensor, torch.cat((chunk(0), chunk(1)), dim=1))


def test_eviction_behind_a_sink_moves_the_sink_alone():
    tokens = Tokens.of(chunk(0)[:, :0])
    for i in range(5):
        tokens = tokens.appended(chunk(i))
    before = tokens.buffer.moved
    shorter = tokens.without(2, 8)
    assert torch.equal(
        shorter.tensor, torch.cat((tokens_of(0, 2), torch.cat([chunk(i) for i in range(5)], 1)[:, 8:]), 1)
    )
    assert shorter.buffer is tokens.buffer and shorter.buffer.moved - before == 2 * 2 * 2 * 4
    assert torch.equal(shorter.appended(chunk(7)).tensor[:, -3:], chunk(7))


def tokens_of(i, count):
    return chunk(i, count)


def test_what_was_overwritten_is_an_error_and_no_other_number():
    tokens = Tokens.of(chunk(0)[:, :0]).appended(chunk(0)).appended(chunk(1))
    tokens.without(1, 4)
    with pytest.raises(StaleError, match=r"rollout\.fork"):
        _ = tokens.tensor


def test_a_fork_stays_readable():
    tokens = Tokens.of(chunk(0)[:, :0]).appended(chunk(0)).appended(chunk(1)).fork()
    shorter = tokens.without(1, 4)
    assert torch.equal(tokens.tensor, torch.cat((chunk(0), chunk(1)), dim=1))
    assert torch.equal(shorter.tensor, torch.cat((chunk(0, 1), chunk(1, 2)), dim=1))
    assert shorter.buffer is not tokens.buffer


def test_leading_tokens_may_become_others():
    tokens = Tokens.of(chunk(0)[:, :0]).appended(chunk(0)).appended(chunk(1))
    assert tokens.without(1, 4, before=chunk(9, 1)).tensor[0, 0, 0, 0] == 9
    assert tokens.without(0, 4).tensor.shape[1] == 2


def test_pieces_without_tokens_cost_no_copy():
    full = chunk(1)
    assert joined([full[:, :0], full]) is full
    assert joined([full[:, :0], full[:, :0]]).shape[1] == 0


def test_a_single_video_has_the_strides_of_a_tensor_of_its_own():
    tokens = Tokens.of(torch.zeros(1, 0, 3, 4))
    for i in range(5):
        tokens = tokens.appended(torch.full((1, 2, 3, 4), float(i)))
        assert tokens.tensor.is_contiguous() and tokens.tensor.stride() == torch.empty(tokens.tensor.shape).stride()
    assert tokens.without(2, 6).tensor.is_contiguous()


def test_tokens_that_are_appended_are_no_change_of_those_before():
    tokens = Tokens.of(torch.zeros(1, 0, 1, 2)).appended(torch.ones(1, 4, 1, 2)).appended(torch.ones(1, 4, 1, 2))
    before = tokens.tensor
    version, longer = before._version, tokens.appended(torch.ones(1, 2, 1, 2))
    assert longer.buffer is tokens.buffer and longer.tensor._base is before._base
    assert before._version == longer.tensor._version == version
    longer.without(2, 4)  # leading tokens are written over the evicted ones
    assert before._version > version


def test_memory_for_a_known_number_is_taken_once_and_what_has_come_is_counted():
    tokens = Tokens.of(torch.zeros(2, 0, 1, 2), most=12)
    for i in range(4):
        tokens = tokens.appended(chunk(i))
        assert tokens.buffer.memory.shape[1] == 12 and tokens.buffer.moved == 0
        assert tokens.nbytes == 2 * 3 * (i + 1) * 2 * 4
    assert torch.equal(tokens.tensor, torch.cat([chunk(i) for i in range(4)], dim=1))
    longer = tokens.appended(chunk(4))  # more than were announced
    assert torch.equal(longer.tensor[:, -3:], chunk(4)) and len(tokens) == 12
    assert longer.buffer.memory.shape[1] == 12 + 3 + 6


def test_a_fork_has_room_for_what_is_to_come_too():
    base = Tokens.of(torch.zeros(2, 0, 1, 2), most=9).appended(chunk(0))
    left, right = base.appended(chunk(1)), base.appended(chunk(2))
    assert left.buffer is base.buffer and right.buffer is not base.buffer
    assert right.appended(chunk(3)).buffer is right.buffer
    assert torch.equal(left.tensor[:, 3:], chunk(1)) and torch.equal(right.tensor[:, 3:], chunk(2))
