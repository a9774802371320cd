"""The scalar quantizer of the codecs."""

import pytest
import torch

from fxq.cache.codecs.scalar import Grid


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_number_is_off_by_at_most_half_a_step_where_scales_are_not_rounded(bits, scale_dtype, asymmetric):
    grid = Grid(bits, asymmetric, scale_dtype)
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0)) * 4
    codes, scale, zero = grid.quantize(x)
    assert int(codes.max()) < 2**bits and scale.dtype == grid.dtype and (zero is not None) == asymmetric
    step = scale.float().unsqueeze(-1)
    # Scale and least value are rounded first, by one part in 16 or 256; a clipped end is off by that much more.
    rounding = (2**bits) * step / (16 if scale_dtype == "float8_e4m3fn" else 256) + x.abs().max() / 16
    assert ((grid.dequantize(codes, scale, zero) - x).abs() <= step / 2 + rounding).all()


def test_two_symmetric_bits_have_three_levels():
    codes, scale, _ = Grid(2).quantize(torch.tensor([[-4.0, -1.0, 0.0, 1.5, 2.5, 4.0]]))
    assert codes.tolist() == [[0, 1, 1, 1, 2, 2]] and float(scale) == 4.0


def test_scales_that_the_format_cannot_hold_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="scale_dtype='bfloat16'"):
        Grid(2).quantize(torch.full((1, 4), 1000.0))
    with pytest.raises(ValueError, match="scale_dtype='bfloat16'"):
        Grid(4).quantize(torch.full((1, 4), 1e-3))
    with pytest.raises(ValueError, match="least values"):
        Grid(2, asymmetric=True).quantize(torch.tensor([[-2000.0, -2000.0]]))
    codes, scale, zero = Grid(2, True, "bfloat16").quantize(torch.full((1, 4), 1e-3))
    assert torch.allclose(Grid(2, True, "bfloat16").dequantize(codes, scale, zero), torch.full((1, 4), 1e-3), rtol=1e-2)


def test_zeros_stay_zeros():
    for grid in (Grid(2), Grid(4, True), Grid(2, True, "bfloat16")):
        codes, scale, zero = grid.quantize(torch.zeros(2, 8))
        assert torch.equal(grid.dequantize(codes, scale, zero), torch.zeros(2, 8))


@pytest.mark.parametrize(("bits", "dtype"), [(3, "bfloat16"), (16, "bfloat16"), (4, "float32")])
def test_what_cannot_be_stored_is_refused(bits, dtype):
    with pytest.raises(ValueError, match=r"stored are 2, 4 or 8|expected 'float8_e4m3fn' or 'bfloat16'"):
        Grid(bits, False, dtype)
