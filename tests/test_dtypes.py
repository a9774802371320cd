import torch

from fxq.dtypes import DTYPES, dtype_name


def test_names_and_dtypes_are_each_others_inverse():
    for name, dtype in DTYPES.items():
        assert getattr(torch, name) is dtype and dtype_name(dtype) == name


def test_every_dtype_that_a_safe_file_can_hold_has_a_name():
    from safetensors.torch import _TYPES

    assert set(_TYPES.values()) <= set(DTYPES.values())
