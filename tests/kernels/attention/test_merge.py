"""Attention in parts equals attention to all keys at once."""

import math

import pytest
import torch

from fxq.kernels.attention import merge as module
from fxq.kernels.attention.merge import attention_lse, merge


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direct(q, k, v):
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double()), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(7,), (3, 5), (0, 4, 1), (40, 0, 60, 2)])
def test_merged_parts_equal_direct_attention(lengths):
    q, k, v = normal(2, 9, 3, 16), normal(2, sum(lengths), 3, 16, seed=1) * 3, normal(2, sum(lengths), 3, 16, seed=2)
    parts = list(zip(k.split(lengths, 1), v.split(lengths, 1), strict=True))
    found = attention_lse(q, *parts[0])
    for part in parts[1:]:
        found = merge(found, attention_lse(q, *part))
    out, lse = direct(q, k, v)
    assert float((found[0] - out).abs().max()) < 1e-5
    assert float((found[1][..., 0] - lse).abs().max()) < 1e-5


def test_the_number_of_scores_at_a_time_changes_nothing(monkeypatch):
    q, k, v = normal(2, 50, 3, 16), normal(2, 40, 3, 16, seed=1), normal(2, 40, 3, 16, seed=2)
    whole = attention_lse(q, k, v)
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 3 * 40 * 7)
    for a, b in zip(attention_lse(q, k, v), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = normal(1, 4, 1, 16) * 200, normal(1, 6, 1, 16, seed=1) * 200, normal(1, 6, 1, 16, seed=2)
    found = merge(attention_lse(q, k[:, :2], v[:, :2]), attention_lse(q, k[:, 2:], v[:, 2:]))
    assert torch.allclose(found[0], direct(q, k, v)[0].float(), atol=1e-4)


def test_no_key_at_all_gives_zeros():
    q, none = normal(1, 4, 2, 8), normal(1, 0, 2, 8)
    out, lse = merge(attention_lse(q, none, none), attention_lse(q, none, none))
    assert not out.any() and bool((lse == -torch.inf).all())


def test_what_is_not_finite_shows():
    q, k, v = normal(1, 4, 1, 8), normal(1, 6, 1, 8, seed=1), normal(1, 6, 1, 8, seed=2)
    q[0, 2, 0, 3] = torch.nan
    out, _ = merge(attention_lse(q, k[:, :3], v[:, :3]), attention_lse(q, k[:, 3:], v[:, 3:]))
    assert (~out.isfinite()).flatten(2).any(-1).tolist() == [[False, False, True, False]]
