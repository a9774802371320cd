"""What lies at a fixed address is what was given, and is copied no more often than it has to be."""

import pytest
import torch

from fxq.cache.tokens import Tokens
from fxq.runtime.cuda_graphs.memory import Memories, Memory, layout_of

CPU = torch.device("cpu")


def memory(count=400):
    return Memory(count, torch.float32, CPU)


def fill(piece, tensor):
    """Bytes copied; what lies there afterwards is the tensor."""
    view = piece.view(layout_of(tensor))
    copied = piece.fill(view, tensor)
    assert torch.equal(view, tensor)
    return copied


def test_a_tensor_is_copied_once_until_it_is_written_to():
    piece, x = memory(), torch.randn(3, 5)
    assert [fill(piece, x) for _ in range(3)] == [60, 0, 0]
    x[1, 1] = 9
    assert [fill(piece, x) for _ in range(2)] == [60, 0]
    x.view(-1)[2:3].zero_()
    assert fill(piece, x) == 60
    assert fill(piece, torch.randn(3, 5)) == 60 and fill(piece, x) == 60


def test_another_tensor_at_the_address_of_one_that_is_gone_is_copied():
    piece, buffer = memory(), torch.zeros(15)
    x = torch.from_numpy(buffer.numpy()).view(3, 5).detach()
    fill(piece, x)
    address, version = x.data_ptr(), x._version
    del x
    buffer.numpy()[:] = 1
    again = torch.from_numpy(buffer.numpy()).view(3, 5).detach()
    assert (again.data_ptr(), again._version) == (address, version)
    assert fill(piece, again) == 60


def test_of_a_view_that_grew_what_was_added_is_copied():
    piece, base = memory(), torch.randn(1, 40, 2, 2)
    assert [fill(piece, base[:, :n]) for n in (10, 10, 16, 16, 40)] == [160, 0, 6 * 16, 0, 24 * 16]
    assert fill(piece, base[:, :7]) == 0 and fill(piece, base[:, :40]) == 0
    base[:, 39] = 1
    assert fill(piece, base[:, :40]) == 640


def test_a_view_that_begins_elsewhere_or_grows_behind_other_dimensions_is_copied_whole():
    piece, base = memory(), torch.randn(1, 40, 2, 2)
    fill(piece, base[:, :20])
    assert fill(piece, base[:, 4:24]) == 320
    assert fill(piece, base[:, :20, :1]) == 160
    assert fill(piece, torch.randn(1, 40, 2, 2)[:, :20]) == 320
    pair = torch.randn(2, 40, 2, 2)
    assert [fill(piece, pair[:, :n]) for n in (10, 12, 12)] == [320, 384, 0]


def test_of_a_rollouts_cache_the_new_tokens_are_copied():
    piece, tokens, grown = memory(), Tokens.of(torch.zeros(1, 0, 2, 2)), 0
    for i in range(8):
        longer = tokens.appended(torch.full((1, 5, 2, 2), float(i)))
        stayed = longer.buffer is tokens.buffer
        assert fill(piece, longer.tensor) // 16 == (5 if stayed else len(longer))  # else they moved to larger memory
        tokens, grown = longer, grown + stayed
    assert grown >= 3
    tokens = tokens.without(2, 12)  # a sink of two tokens is written in front of the others
    assert fill(piece, tokens.tensor) // 16 == 30


def test_tensors_of_inference_mode_are_copied_every_time():
    with torch.inference_mode():
        x = torch.randn(3, 5)
    piece = memory()
    assert [fill(piece, x) for _ in range(2)] == [60, 60]
    with torch.inference_mode():
        x.zero_()
    assert fill(piece, x) == 60


@pytest.mark.parametrize("x", [torch.zeros(3, 0), torch.zeros(0)])
def test_nothing_is_no_copy_and_leaves_what_lies_there(x):
    piece, other = memory(), torch.randn(4)
    fill(piece, other)
    assert fill(piece, x) == 0 and fill(piece, other) == 0


def test_dense_tensors_keep_their_strides_and_others_become_contiguous():
    piece = memory()
    for x, strides in (
        (torch.randn(3, 5).T, (1, 5)),
        (torch.randn(3, 8)[:, :5], (5, 1)),
        (torch.randn(3, 1).expand(3, 4), (4, 1)),
        (torch.tensor(3.0), ()),
    ):
        assert piece.view(layout_of(x)).stride() == strides
        assert fill(piece, x) == 4 * x.numel() and fill(piece, x) == 0


def test_a_copy_that_failed_is_made_again():
    piece, x = memory(), torch.randn(3, 5)
    fill(piece, x)
    with pytest.raises(RuntimeError):
        piece.fill(torch.empty(2, 2), torch.randn(3, 5))
    assert fill(piece, x) == 60


def test_all_shapes_of_a_place_share_memory_that_grows_by_half():
    memories = Memories(CPU)
    sizes = [memories.at("k", torch.float32, n).flat.numel() for n in (0, 10, 4, 12, 18, 19, 28, 10)]
    assert sizes == [0, 10, 10, 18, 18, 28, 28, 28]
    assert memories.nbytes == 4 * (10 + 18 + 28)
    assert memories.at("v", torch.float32, 3).flat.numel() == memories.at("k", torch.int8, 3).flat.numel() == 3
    assert memories.at("k", torch.float32, 30, exactly=True).flat.numel() == 30
