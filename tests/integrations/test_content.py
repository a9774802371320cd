import pytest
import torch

from fxq.integrations import content
from fxq.integrations.content import check_sum, slices
from tests.toys import rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8]


def sums(tensor):
    count = slices(tensor)
    return [int(check_sum(tensor, i, count)) for i in range(count)]


@pytest.fixture(params=["host", "device"], autouse=True)
def place(request, monkeypatch):
    """Both ways of summing; the second one's operators run on the CPU here."""
    if request.param == "device":
        monkeypatch.setattr(content, "_on_host", content._on_device)


def made(dtype, *shape):
    return (rows(*shape) * 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (1021,), (7, 13), (64, 96), (5, 3001)], ids=str)
def test_every_single_element_counts(dtype, shape):
    tensor = made(dtype, *shape)
    before = sums(tensor)
    flat = tensor.view(-1)
    for i in {0, 1, flat.numel() // 2, flat.numel() - 1}:
        was = flat[i].clone()
        flat[i] = was + 3
        assert sums(tensor) != before, i
        flat[i] = was
    assert sums(tensor) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_counts(dtype):
    tensor = made(dtype, 64, 1536)
    others = (tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(8, 1), tensor[torch.randperm(64)])
    assert sums(tensor) not in [sums(other.contiguous()) for other in others]
    swapped = tensor.clone()
    swapped[[3, 40]] = tensor[[40, 3]]
    assert sums(tensor) != sums(swapped)


def test_the_memory_counts_and_not_the_view():
    tensor = rows(40, 24)
    assert sums(tensor) == sums(tensor.clone()) == sums(tensor.t()) == sums(tensor.view(-1))
    odd = torch.empty(961).copy_(torch.cat([torch.zeros(1), tensor.view(-1)]))[1:].view(40, 24)
    before = sums(odd)
    odd[39, 23] += 1
    assert odd.storage_offset() == 1 and sums(odd) != before
    changed = rows(40, 48)[:, ::2]
    before = sums(changed)
    changed[7, 3] += 1
    assert sums(changed) != before


def test_a_sliced_tensor_is_covered_and_each_slice_is_spread_over_it(monkeypatch):
    monkeypatch.setattr(content, "SLICE", 1 << 16)
    tensor = rows(300, 1000)
    assert slices(tensor) == 19
    before = sums(tensor)
    tensor.view(-1)[123_457] += 1
    assert sum(a != b for a, b in zip(before, sums(tensor), strict=True)) == 1
    tensor[:, 17] += 1
    assert all(a != b for a, b in zip(before, sums(tensor), strict=True))


def test_an_empty_tensor_has_a_sum():
    assert sums(torch.empty(0, 5)) == sums(torch.empty(0)) != sums(torch.zeros(1) + 1)
