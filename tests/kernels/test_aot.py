"""The shipped kernels, compiled for GPUs that need not be there, against the counts of tests/kernels/aot_table.json.

After a change that is meant to move the counts: ``python -m tests.kernels.aot --write``, and read the difference.
"""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
aot = pytest.importorskip("tests.kernels.aot", reason="this Triton has no Gluon")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET replaces the compiler"),
    pytest.mark.skipif(not (aot.TOOLS / "nvdisasm").exists(), reason="this Triton has no NVIDIA tools"),
]

VERSION, TABLE = aot.read_table()
SAME_VERSION = triton.__version__ == VERSION
REGISTERS_ABOVE = 4 if SAME_VERSION else 24
"""How many registers more than in the table are taken for noise of NVIDIA's compiler."""

IN_8_BITS = ("attention-int8", "attention-stored", "attention-fp8 ", "attention-fp8-first", "attention-fp8-64-rows")
KIB = 1024
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may use."""

FAST = (
    "linear-w8-store-128x256x64 sm_90",
    "linear-w4-store-128x128x128 sm_90",
    "gluon-256x128x128 sm_90",
    "quantize-fp8-gather sm_90",
    "weight-sums-w8 sm_90",
    "attention-part-prq sm_80",
    "attention-stored sm_90",
    "attention-fp8 sm_90",
)


def check(key: str, counts: aot.Counts) -> None:
    """Nothing spills, everything fits, and nothing is worse than in the table."""
    known, target = TABLE[key], key.split(" ")[1]
    assert counts.spills == 0
    if SAME_VERSION or target.startswith("sm"):
        assert counts.registers <= min(255, known.registers + REGISTERS_ABOVE)
    assert counts.shared <= SHARED[target] * KIB
    assert set(counts.tensor_core) == set(known.tensor_core)
    assert counts.waits == known.waits
    for name in ("copies", "loads", "stores"):
        all_now, wide_now = getattr(counts, name)
        all_then, wide_then = getattr(known, name)
        assert wide_now == all_now or wide_now >= wide_then, f"{name}: {wide_now} of {all_now} move 16 bytes"
        assert bool(all_now) == bool(all_then), f"{name}: {all_now}, in the table {all_then}"
    if SAME_VERSION:
        assert counts.shared_stores <= known.shared_stores
        assert counts.tensor_core == known.tensor_core


def test_the_table_has_every_shipped_kernel_and_no_other() -> None:
    assert sorted(TABLE) == sorted(aot.keys()), "run python -m tests.kernels.aot --write"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_largest_tile_keeps_its_sums_in_registers_and_copies_16_bytes(target: str) -> None:
    counts = TABLE[f"linear-w8-store-128x256x64 {target}"]
    total, wide = counts.copies
    assert counts.spills == 0 and total == wide > 0


@pytest.mark.parametrize("tile", ["128x128x128", "64x128x128", "64x64x128"])
def test_packed_weights_stay_out_of_shared_memory_on_hopper(tile: str) -> None:
    epilogue_only = TABLE[f"linear-w8-store-{tile} sm_90"].shared_stores
    assert TABLE[f"linear-w4-store-{tile} sm_90"].shared_stores <= epilogue_only


def test_gluon_keeps_a_product_in_flight_and_triton_does_not() -> None:
    assert "1" in TABLE["gluon-256x128x128 sm_90"].waits
    assert "1" not in TABLE["linear-w8-store-128x256x64 sm_90"].waits


@pytest.mark.parametrize("key", [key for key in TABLE if key.startswith(IN_8_BITS)])
def test_attention_in_8_bits_is_on_tensor_cores_and_copies_16_bytes(key: str) -> None:
    counts, target = TABLE[key], key.split(" ")[1]
    halves = {"sm_90": ("IGMMA", "HGMMA"), "sm_100": ("IMMA", "UTCHMMA")}.get(target, ("IMMA", "HMMA"))
    scores, values = halves if "fp8" not in key else (halves[0], halves[1].replace("HMMA", "QMMA").replace("HG", "QG"))
    assert set(counts.tensor_core) == {scores, values} and min(counts.tensor_core.values()) > 0
    assert counts.spills == 0 and counts.shared <= SHARED[target] * KIB
    total, wide = counts.copies
    if key.split(" ")[0].endswith("fp32"):
        assert total == 0, "there is one stage"
    else:
        assert wide >= 8 and total - wide <= 4, "scales alone are copied in less than 16 bytes"
    few = 2 if "fp8-64-rows" in key else 1  # eight warps share 64 rows
    stores = (16 // few + 1, 16 // few)
    assert counts.loads[1] >= 4 // few and counts.stores == stores, "the codes of queries, and the result"


@pytest.mark.parametrize("key", FAST)
def test_a_kernel_compiles_to_the_counts_of_the_table(key: str) -> None:
    check(key, aot.measure(key))


def tile_of(key: str) -> str:
    return "".join(re.findall(r"\d+x\d+x\d+", key))


SAMPLE = sorted(TABLE)[::40]
SAMPLE += sorted({tile_of(key): key for key in TABLE if tile_of(key) not in map(tile_of, SAMPLE)}.values())
"""For `make test`: forty and the seven targets have no common divisor, so that all targets come up; and one of each
tile that did not. The other kernels it compiles as they are launched, see test_launches.py.
"""


def test_the_sample_has_every_target_and_tile() -> None:
    for part in (lambda key: key.split(" ")[1], tile_of):
        assert {part(key) for key in (*SAMPLE, *FAST)} == {part(key) for key in TABLE}


@pytest.fixture(scope="module")
def sampled() -> dict[str, aot.Counts]:
    return aot.measure_all([key for key in SAMPLE if key not in FAST])


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in SAMPLE if key not in FAST])
def test_the_sample_compiles_to_the_counts_of_the_table(key: str, sampled: dict[str, aot.Counts]) -> None:
    check(key, sampled[key])


@pytest.fixture(scope="module")
def measured() -> dict[str, aot.Counts]:
    return aot.measure_all([key for key in TABLE if key not in (*FAST, *SAMPLE)])


@pytest.mark.sweep
@pytest.mark.parametrize("key", [key for key in TABLE if key not in (*FAST, *SAMPLE)])
def test_every_shipped_kernel_compiles_to_the_counts_of_the_table(key: str, measured: dict[str, aot.Counts]) -> None:
    check(key, measured[key])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"spills": 3}, "spills"),
        ({"registers": 250}, "registers"),
        ({"shared": 300 * KIB}, "shared"),
        ({"tensor_core": {"HMMA": 8}}, "HMMA"),
        ({"copies": (40, 20)}, "copies: 20 of 40 move 16 bytes"),
        ({"copies": (0, 0)}, "copies: 0, in the table"),
    ],
)
def test_a_worse_kernel_is_noticed(counts: dict[str, object], message: str) -> None:
    key = "linear-w8-store-128x128x128 sm_80"
    check(key, TABLE[key])
    with pytest.raises(AssertionError, match=message):
        check(key, aot.Counts(**(vars(TABLE[key]) | counts)))
