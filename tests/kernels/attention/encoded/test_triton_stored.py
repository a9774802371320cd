"""The instructions that make floats of stored codes, carried out one by one; the kernel is interpreted elsewhere."""

import struct

import pytest
import torch

from fxq.kernels.attention.encoded import triton_stored


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def single(x):
    return struct.unpack("<f", struct.pack("<I", x))[0]


def halves(x):
    return [struct.unpack("<e", struct.pack("<H", x >> shift & 0xFFFF))[0] for shift in (0, 16)]


def brain(x):
    """The upper 16 bits of a float32 that has no others."""
    assert not bits(x) & 0xFFFF
    return bits(x) >> 16


def permuted(a, b, selector):
    """prmt: each byte is the one of the eight of b and a that its nibble names."""
    both = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(both[selector >> 4 * i & 7] for i in range(4)), "little")


def halves_less(a, b):
    parts = [struct.unpack("<H", struct.pack("<e", x - y))[0] for x, y in zip(halves(a), halves(b), strict=True)]
    return parts[1] << 16 | parts[0]


OPERATIONS = {
    "mov": lambda a: a,
    "xor": lambda a, b: a ^ b,
    "prmt": permuted,
    "sub.rn.f32": lambda a, b: bits(single(a) - single(b)),
    "sub.rn.f16x2": halves_less,
    "cvt": lambda upper, lower: brain(single(upper)) << 16 | brain(single(lower)),
}


def carried_out(text, packed):
    """What the registers $0 and $1 hold, of the word $2."""
    known = {"$2": packed}
    for line in text.strip("{}\n ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        out, *operands = (part.strip() for part in rest.split(","))
        values = [known[o] if o in known else int(o.removeprefix("0f").removeprefix("0x"), 16) for o in operands]
        known[out] = OPERATIONS[name if name.startswith("sub") else name.split(".")[0]](*values)
    return known["$0"], known["$1"]


@pytest.mark.parametrize("name", ["TO_BFLOAT16", "TO_FLOAT16"])
def test_every_code_becomes_its_number(name):
    text = getattr(triton_stored, name)
    dtype = torch.bfloat16 if name == "TO_BFLOAT16" else torch.float16
    codes = torch.arange(-128, 128, dtype=torch.int8).view(-1, 4)
    for row in codes:
        word = int.from_bytes(row.numpy().tobytes(), "little")
        words = carried_out(getattr(text, "value", text), word)
        got = torch.frombuffer(bytearray(struct.pack("<II", *words)), dtype=dtype)
        assert torch.equal(got, row.to(dtype)), (row, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tile_never_reads_two_blocks_of_values(dtype):
    assert all(triton_stored.VALUE_BLOCK % triton_stored.tile_of(dtype, arch).keys == 0 for arch in (80, 90, 100, 120))
