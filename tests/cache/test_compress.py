"""A history as the means of its clusters."""

import torch

from fxq.cache.compress import Few, compressed
from fxq.kernels import attention, attention_weighted


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_of_a_few_kinds_lose_nothing():
    kinds_k, kinds_v = normal(2, 4, 3, 8) * 3, normal(2, 4, 3, 8, seed=1)
    order = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(2))
    keys, values = kinds_k[:, order], kinds_v[:, order]
    few = compressed(keys, values, 12)
    q, k, v = normal(2, 5, 3, 8, seed=3), normal(2, 4, 3, 8, seed=4), normal(2, 4, 3, 8, seed=5)
    got = attention_weighted(q, [k], [v], few.keys, few.values, few.weight)
    assert torch.allclose(got, attention(q, [keys, k], [values, v]), atol=1e-4)


def test_weights_count_every_token_once():
    few = compressed(normal(2, 60, 3, 8), normal(2, 60, 3, 8, seed=1), 7)
    assert few.keys.shape == few.values.shape == (2, 7, 3, 8) and few.weight.shape == (2, 7, 3)
    assert bool((few.weight.sum(1) == 60).all())
    total = (few.values * few.weight.unsqueeze(-1)).sum(1)
    assert torch.allclose(total, normal(2, 60, 3, 8, seed=1).sum(1), atol=1e-3)


def test_as_many_clusters_as_tokens_keep_them_all():
    keys, values = normal(1, 6, 2, 8), normal(1, 6, 2, 8, seed=1)
    few = compressed(keys, values, 99)
    assert torch.equal(few.keys, keys) and torch.equal(few.values, values) and bool((few.weight == 1).all())


def test_a_video_does_not_depend_on_the_others_of_its_batch():
    keys, values = normal(3, 40, 2, 8), normal(3, 40, 2, 8, seed=1)
    whole, alone = compressed(keys, values, 5), compressed(keys[1:2], values[1:2], 5)
    assert torch.equal(whole.keys[1:2], alone.keys) and torch.equal(whole.weight[1:2], alone.weight)


def test_no_history_is_no_key():
    none = Few.none(normal(2, 4, 3, 8))
    assert none.nbytes == 0 and none.inputs()["weight"].shape == (2, 0, 3)
