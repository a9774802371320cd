"""Codes in bytes."""

import pytest
import torch

from fxq.cache.codecs.packing import PACKED_BITS, pack, packed_size, unpack


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_codes_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (3, 5, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00111001]


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="expected one of 1, 2, 4, 8"):
        pack(torch.zeros(8), bits)
