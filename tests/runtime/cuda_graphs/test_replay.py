"""Calls through graphs are the module's own, with one capture for each combination of shapes."""

import dataclasses
import gc
import threading
import weakref

import pytest
import torch

import fxq
from fxq.bench.rollout import last_call
from fxq.cache.codecs import PRESETS
from fxq.cache.policy import CachePolicy
from fxq.passes import pack_cache
from fxq.runtime.cuda_graphs.refusals import CudaGraphError
from tests.cuda import FakeGraph, FakeStream, fake_cuda
from tests.toys import wan_rollout

ONES = torch.ones(4)


@pytest.fixture
def graphs(monkeypatch):
    return fake_cuda(monkeypatch)


def attend(x, pieces):
    """Reads every piece."""
    return x + sum(piece.sum() for piece in pieces), [piece[:1] for piece in pieces]


def made(function=attend, **options):
    return fxq.CudaGraphs(function, device="cpu", **options)


TOKENS, CHUNKS, CALLS = 12, 7, 3
"""Tokens of a chunk, chunks of a video, calls of a chunk."""


def video():
    return wan_rollout(seeds=(1,), frames=2 * CHUNKS)


@pytest.fixture(scope="module")
def quantized():
    rollout = video()
    args, shapes = rollout.example_call()
    recipe = "w8a8-dynamic"
    return fxq.quantize(rollout.denoiser, None, recipe, example_inputs=args, dynamic_shapes=shapes, progress=False)


def tokens_copied(rollout, run):
    """Latents of a video through graphs, and per chunk the cached tokens and those of them that were copied."""
    calls = []

    def told(*args):
        copied = run.copied
        output = run(*args)
        calls.append((args[5][0].shape[1], run.copied - copied))
        return output

    with rollout.using(told):
        latents = rollout.rollout(*rollout.batches[0])
    token = 2 * len(rollout.model.blocks) * rollout.model.config.dim * 4
    found = []
    for chunk in range(CHUNKS):
        (length, first), *others = calls[CALLS * chunk : CALLS * (chunk + 1)]
        rest = others[-1][1]  # what changes in each call, and nothing of the cache
        assert others == [(length, rest)] * (CALLS - 1)
        if chunk:  # the first call of all has no text keys
            assert (first - rest) % token == 0
            found.append((length, (first - rest) // token))
    return latents, found


def test_a_rollout_is_the_same_with_one_capture_a_length_of_the_cache(graphs, quantized):
    rollout, fast = video(), fxq.optimize(quantized, floats_where_faster=False)
    run, reserved = fxq.CudaGraphs(fast), fxq.CudaGraphs(fast)
    with rollout.using(fast):
        want = rollout.rollout(*rollout.batches[0])
    for _ in range(2):
        with rollout.using(run):
            assert torch.equal(rollout.rollout(*rollout.batches[0]), want)
    assert len(run.captures) == len(graphs.made) == 1 + CHUNKS  # the first call reads the prompt
    got, copied = tokens_copied(rollout, run)
    assert torch.equal(got, want) and len(run.captures) == 1 + CHUNKS
    assert len({graph.pool for graph in graphs.made}) == 1
    # Memory for 12, 36 and 72 tokens: what goes on in the same piece is not copied again.
    assert copied == [(12, 12), (24, 24), (36, 12), (48, 48), (60, 12), (72, 12)]
    reserved.reserve(*last_call(rollout))
    for _ in range(2):
        got, copied = tokens_copied(rollout, reserved)
        assert torch.equal(got, want) and copied == [(n, TOKENS) for n in range(12, 84, 12)]
    assert reserved.nbytes < run.nbytes


def test_a_growing_list_of_pieces_has_one_buffer_a_piece_and_copies_it_once(graphs):
    run, pieces = made(), []
    for count in range(1, 7):
        pieces = [*pieces, torch.full((100,), float(count))]
        for _ in range(3):
            x = torch.randn(4)
            got, heads = run(x, pieces)
            assert torch.equal(got, x + sum(100.0 * n for n in range(1, count + 1)))
            assert [float(head) for head in heads] == list(range(1, count + 1))
    assert len(run.captures) == 6
    assert run.copies == 18 + 6 and run.copied == 18 * 16 + 6 * 400
    assert run.nbytes == 16 + 6 * 400 + (16 + 6 * 4)  # inputs, outputs: not 1 + 2 + ... + 6 pieces
    assert run.captures[2] == {"x": "float32[4]", **{f"pieces[{i}]": "float32[100]" for i in range(3)}}


def test_pieces_of_a_rolling_window_are_copied_once_a_move_and_captured_once(graphs):
    run, pieces = made(), [torch.full((100,), float(n)) for n in range(4)]
    for step in range(4, 9):
        for _ in range(3):
            assert torch.equal(run(ONES, pieces)[0], ONES + 100 * (4 * step - 10))
        pieces = [*pieces[1:], torch.full((100,), float(step))]
    assert len(run.captures) == 1
    assert run.copied == 16 + 5 * 4 * 400


def test_what_is_written_in_place_is_read_anew(graphs):
    run, cache = made(), [torch.zeros(3), torch.zeros(3)]
    assert torch.equal(run(ONES, cache)[0], ONES)
    cache[1] += 1
    cache[0].view(3, 1)[0] = 5
    assert torch.equal(run(ONES, cache)[0], 9 * ONES)
    before = run.copies
    assert torch.equal(run(ONES, cache)[0], 9 * ONES) and run.copies == before


def test_outputs_are_new_tensors_unless_the_graphs_own_are_asked_for(graphs, monkeypatch):
    run = made()
    first, second = run(ONES, [ONES])[0], run(2 * ONES, [ONES])[0]
    assert torch.equal(first, 5 * ONES) and torch.equal(second, 6 * ONES)
    monkeypatch.setattr(FakeGraph, "keeps", True)
    run = made(fresh_outputs=False)
    first = run(ONES, [ONES])[0]
    assert torch.equal(first, 5 * ONES)
    second = run(2 * ONES, [ONES])[0]
    assert second is not first and second.data_ptr() == first.data_ptr() and torch.equal(first, 6 * ONES)


def test_outputs_may_be_inputs_of_the_next_call(graphs):
    run, x = made(), ONES
    for i in range(5):
        x, _ = run(x, [ONES])
        assert torch.equal(x, ONES + 4 * (i + 1))


def test_graphs_of_other_shapes_run_in_any_order(graphs):
    run = made()
    for count in (3, 1, 2, 3, 1, 2, 2, 3):
        x, pieces = torch.randn(4), [torch.randn(count, 2) for _ in range(count)]
        got, want = run(x, pieces), attend(x, pieces)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
    assert len(run.captures) == 3


def test_dtypes_strides_nesting_names_and_autocast_have_graphs_of_their_own(graphs):
    run = made(lambda x, scale=1.0: x @ x * scale)
    x = torch.randn(3, 3)
    calls = [((x,), {}), ((x.double(),), {}), ((x.T,), {}), ((), {"x": x}), ((x, 2.0), {}), ((x,), {"scale": 2.0})]
    for _ in range(2):
        for args, kwargs in calls:
            assert torch.equal(run(*args, **kwargs), run.module(*args, **kwargs))
    assert len(run.captures) == len(calls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
    assert run(x).dtype == torch.float32 and len(run.captures) == len(calls) + 1


def test_more_graphs_than_the_limit_are_an_error_that_names_what_varies(graphs):
    run = made(limit=2)
    for count in (1, 2):
        run(ONES, [ONES[:count]])
    message = (
        r"2 graphs are captured, limit=2, .* What varies: pieces\[0\] \(float32\[1\], float32\[2\], float32\[3\]\)"
    )
    with pytest.raises(CudaGraphError, match=message):
        run(ONES, [ONES[:3]])
    assert torch.equal(run(ONES, [ONES[:2]])[0], 3 * ONES)
    with pytest.raises(CudaGraphError, match="limit = 0: expected at least 1, or None"):
        made(limit=0)


def test_with_room_for_the_longest_call_nothing_grows(graphs):
    grown, reserved = made(), made()
    reserved.reserve(ONES.to("meta"), [torch.empty(1, 60, 2, device="meta")])
    base = torch.randn(1, 60, 2)
    for run in (grown, reserved):
        for count in range(10, 70, 10):
            assert torch.equal(run(ONES, [base[:, :count]])[0], attend(ONES, [base[:, :count]])[0])
    assert reserved.copied == 16 + base.nbytes < grown.copied and reserved.nbytes < grown.nbytes
    assert len(reserved.captures) == len(grown.captures) == 6


def test_wrong_inputs_are_refused_by_name(graphs):
    run = made()
    with pytest.raises(CudaGraphError, match=r"input pieces\[1\] requires grad"):
        run(ONES, [ONES, torch.ones(4, requires_grad=True)])
    with pytest.raises(CudaGraphError, match="input x lies on meta and the module on cpu"):
        run(ONES.to("meta"), [ONES])
    assert not run.captures


def test_moved_weights_are_refused_and_changed_ones_are_read(graphs):
    module = torch.nn.Linear(4, 2).eval()
    run, x = fxq.CudaGraphs(module), torch.randn(3, 4)
    assert torch.equal(run(x), module(x)) and not run(x).requires_grad
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(run(x), module(x))
    module.weight.data = module.weight.data.clone()
    with pytest.raises(CudaGraphError, match=r"weights of Linear were moved since.*make a new CudaGraphs"):
        run(x)


def test_a_call_within_a_capture_is_refused(graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CudaGraphError, match="is being captured into another graph"):
        made()(ONES, [ONES])


def test_a_call_on_another_stream_waits_for_the_one_before(graphs, monkeypatch):
    run = made()
    run(ONES, [ONES])
    before = FakeStream.waits
    run(ONES, [ONES])
    assert FakeStream.waits == before
    other = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: other)
    run(ONES, [ONES])
    assert FakeStream.waits == before + 1
    assert sum(tensor.nbytes for tensor in other.used) == run.nbytes


def test_closing_or_dropping_frees_graphs_and_memory(graphs):
    run = made()
    run(ONES, [ONES])
    seen = [weakref.ref(graph) for graph in graphs.made]
    memory = weakref.ref(next(iter(run._graphs.values())).places[0].memory)
    graphs.made.clear()
    run.close()
    gc.collect()
    assert seen[0]() is None and memory() is None
    assert not run.captures and run.nbytes == run.copies == run.copied == 0
    assert torch.equal(run(ONES, [ONES])[0], 5 * ONES) and len(run.captures) == 1
    seen = weakref.ref(graphs.made.pop())
    del run
    gc.collect()
    assert seen() is None


def test_inference_mode_may_come_and_go(graphs):
    run, x = made(), torch.randn(4)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            y = torch.randn(4)
            for piece in (x, y):
                got, _ = run(piece, [piece])
                assert torch.equal(got, piece + piece.sum()) and not got.is_inference()
    assert len(run.captures) == 1


def test_an_encoded_cache_is_replayed_too(graphs, quantized):
    policy = CachePolicy(keys=PRESETS["int8"], values=PRESETS["int8"], span=1)
    rollout, packed = video(), pack_cache(quantized, policy)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    with rollout.using(packed):
        want = rollout.rollout(*rollout.batches[0])
    run = fxq.CudaGraphs(packed)
    for _ in range(2):
        with rollout.using(run):
            assert torch.equal(rollout.rollout(*rollout.batches[0]), want)
    assert any("packed" in name for name in run.captures[0])
    assert len(run.captures) == len(graphs.made) == 1 + CHUNKS


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_rolling_window_is_copied_once_a_chunk_and_has_a_bounded_number_of_graphs(graphs, positions):
    rollout = video()
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=CachePolicy(window=8, sink=2, positions=positions))
    want, run = rollout.rollout(*rollout.batches[0]), fxq.CudaGraphs(rollout.denoiser)
    got, copied = tokens_copied(rollout, run)
    assert torch.equal(got, want)
    assert len(run.captures) == 1 + 4  # no cache, and up to three chunks beside the new one
    assert [length for length, _ in copied] == [12, 24, 36, 36, 36, 36]
    assert copied[3:] == [(36, 36)] * 3


def test_threads_take_turns(graphs):
    inside, most = [0], [0]

    def slow(x):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        result = x * 2
        threading.Event().wait(0.01)
        inside[0] -= 1
        return result

    run, results = made(slow), {}

    def work(value):
        results[value] = run(torch.full((value,), float(value)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and all(torch.equal(y, torch.full((n,), 2.0 * n)) for n, y in results.items())
    assert len(results) == len(run.captures) == 4
