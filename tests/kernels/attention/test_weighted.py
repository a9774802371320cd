"""Attention to keys that stand for many: a weight of n is the key n times, and no such key changes nothing."""

import pytest
import torch

from fxq.kernels import attention, attention_weighted


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_weight_counts_the_key_so_often():
    q, k, v = normal(2, 6, 3, 16), normal(2, 5, 3, 16, seed=1), normal(2, 5, 3, 16, seed=2)
    few_k, few_v, counts = normal(2, 2, 3, 16, seed=3), normal(2, 2, 3, 16, seed=4), (4, 7)
    weight = torch.tensor(counts, dtype=torch.float32).view(1, 2, 1).expand(2, 2, 3)
    got = attention_weighted(q, [k], [v], few_k, few_v, weight)
    often = torch.tensor(counts)
    want = attention(q, [k, few_k.repeat_interleave(often, 1)], [v, few_v.repeat_interleave(often, 1)])
    assert torch.allclose(got, want, atol=1e-5)


def test_each_head_has_weights_of_its_own_and_zero_is_no_key():
    q, k, v = normal(1, 6, 2, 16), normal(1, 5, 2, 16, seed=1), normal(1, 5, 2, 16, seed=2)
    few_k, few_v = normal(1, 1, 2, 16, seed=3), normal(1, 1, 2, 16, seed=4)
    got = attention_weighted(q, [k], [v], few_k, few_v, torch.tensor([[[1.0, 0.0]]])).unflatten(2, (2, 16))
    with_it = attention(q, [k, few_k], [v, few_v]).unflatten(2, (2, 16))
    without = attention(q, [k], [v]).unflatten(2, (2, 16))
    assert torch.allclose(got[:, :, 0], with_it[:, :, 0], atol=1e-5)
    assert torch.allclose(got[:, :, 1], without[:, :, 1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_such_keys_it_is_attention_bit_for_bit(dtype):
    q, k, v = (normal(2, 6, 3, 16, seed=s, dtype=dtype) for s in range(3))
    none = q[:, :0]
    got = attention_weighted(q, [k, q], [v, v], none, none, torch.zeros(2, 0, 3))
    assert torch.equal(got, attention.reference(q, [k, q], [v, v]))


def test_what_does_not_fit_is_refused():
    q = normal(2, 6, 3, 16)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(2, 2, 3\): expected float32 \(2, 4, 3\)"):
        attention_weighted(q, [q], [q], q[:, :4], q[:, :4], torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match=r"v\[1\] \(2, 3, 3, 16\): expected the same shape"):
        attention_weighted(q, [q], [q], q[:, :4], q[:, :3], torch.zeros(2, 4, 3))
