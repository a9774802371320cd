import dataclasses
import functools

import pytest

from fxq.planning.gpus import GPUS, find_gpu
from fxq.planning.memory import LinearCall, linear_calls, meta_model
from fxq.planning.roofline import (
    ARITHMETICS,
    COMPILED,
    EAGER,
    W4A8,
    W8A8,
    W8A8_ATTENTION,
    call_seconds,
    chunk_seconds,
    frames_per_second,
    gain,
)
from fxq.planning.workloads import find_workload

WAN = find_workload("self-forcing")


@functools.cache
def calls(frames=3):
    return linear_calls(meta_model(WAN.config), frames, WAN.latent)


def video_seconds(gpu, arithmetic, end):
    return 5 * sum(
        call_seconds(WAN, calls(), find_gpu(gpu), arithmetic, 4680 * chunk, end).total for chunk in range(1, 8)
    )


@pytest.mark.parametrize(
    ("gpu", "arithmetic", "seconds"),
    [
        ("A6000", EAGER, 11.9),
        ("A6000", COMPILED, 8.9),
        ("4090", EAGER, 8.8),
        ("4090", COMPILED, 6.6),
        ("H200", EAGER, 2.4),
        ("H200", COMPILED, 1.9),
    ],
)
def test_single_rates_measured_on_matrices_give_a_video_time_inside_the_range(gpu, arithmetic, seconds):
    assert video_seconds(gpu, arithmetic, 1) < seconds < video_seconds(gpu, arithmetic, 0)


@pytest.mark.parametrize(("arithmetic", "seconds"), [(COMPILED, 18.02), (W8A8, 13.85)], ids=["bf16", "int8"])
def test_the_published_time_of_two_videos_on_an_a6000_lies_in_the_range(arithmetic, seconds):
    """Q-ARVD, arXiv 2605.21072."""
    assert 2 * video_seconds("A6000", arithmetic, 1) < seconds < 2 * video_seconds("A6000", arithmetic, 0)


def test_the_published_gain_on_an_a6000_lies_in_the_range():
    low, high = gain(WAN, calls(), find_gpu("A6000"), 4 * 4680)
    assert low < 18.02 / 13.85 < high < 2


def test_linears_of_a_block_have_their_operations():
    block = [call for call in calls() if call.layer.startswith("blocks.3.")]
    assert sum(2 * call.width * call.outputs for call in block if call.rows) == pytest.approx(83.4e6, rel=1e-3)


@pytest.mark.parametrize("name", ["A6000", "H200", "B200"])
def test_int8_scores_save_what_the_rates_of_products_say(name):
    gpu = find_gpu(name)
    for end in (0, 1):
        exact, ints = (call_seconds(WAN, calls(), gpu, a, 18720, end).attention for a in (W8A8, W8A8_ATTENTION))
        ratio = gpu.bf16 * gpu.attainable.bf16[end] / (gpu.int8 * gpu.attainable.int8[end])
        assert ints / exact == pytest.approx(0.5 + 0.5 * ratio)
        assert (ints > exact) == (name == "B200"), "which has no fast path for int8"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda arithmetic: arithmetic.name)
def test_fast_is_faster_than_slow_and_longer_caches_cost_more(gpu, arithmetic):
    short, long = (chunk_seconds(WAN, calls(), gpu, arithmetic, keys) for keys in (4680, 32760))
    assert 0 < short[0] < short[1] and short[0] < long[0] < long[1]
    low, high = frames_per_second(WAN, short)
    assert low == 12 / short[1] and high == 12 / short[0]


def test_four_bit_weights_pay_when_rows_are_few_and_not_when_they_are_many():
    gpu, few = find_gpu("L4"), [dataclasses.replace(call, rows=min(call.rows, 8)) for call in calls()]
    for end in (0, 1):
        w4, w8, bf16 = (call_seconds(WAN, few, gpu, a, 4680, end).linears for a in (W4A8, W8A8, COMPILED))
        assert w4 < 0.6 * w8 < 0.6 * 0.6 * bf16
        many = [call_seconds(WAN, calls(), gpu, a, 4680, end).linears for a in (W4A8, W8A8)]
        assert many[0] >= many[1]


def test_launches_bound_small_problems_at_the_slow_end():
    few = linear_calls(meta_model(WAN.config), 1, (2, 2))
    tiny = dataclasses.replace(WAN, latent=(2, 2), frames_per_chunk=1)
    slow, fast = (call_seconds(tiny, few, find_gpu("H200"), EAGER, 1, end) for end in (0, 1))
    assert slow.total == slow.launches == 30 * 60 * 5e-6 and fast.total < slow.total


def test_no_gain_is_expected_from_int8_without_a_fast_path():
    low, high = gain(WAN, calls(), find_gpu("B200"), 4 * 4680)
    assert low < 0.6 and high < 1.1
    assert gain(WAN, calls(), find_gpu("4090"), 4 * 4680)[0] > 1.1


def test_the_gain_fades_as_attention_grows():
    gains = [gain(WAN, calls(), find_gpu("A6000"), keys) for keys in (4680, 32760, 4_000_000)]
    assert gains[0][1] > gains[1][1] > gains[2][1] and gains[2][1] < 1.02


@pytest.mark.parametrize(
    ("arithmetic", "moved"),
    [
        (COMPILED, 2 * 4096 * 1024 + 3 * (2 * 4096 + 2 * 1024)),
        (W8A8, 4096 * 1024 + 3 * (4096 + 2 * 1024)),
        (W4A8, 4096 * 1024 // 2 + 3 * (4096 + 2 * 1024)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_few_rows_take_the_time_of_the_bytes_that_move(arithmetic, moved):
    gpu, call = find_gpu("A6000"), LinearCall("blocks.0.ffn.2", 3, 4096, 1024, True)
    seconds = call_seconds(WAN, [call], gpu, arithmetic, 4680, 1).linears
    assert seconds == pytest.approx(moved / (768e9 * gpu.attainable.bandwidth[1]))
