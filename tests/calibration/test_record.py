import collections
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxq
from fxq.calibration.record import RecordError, Recording, record
from fxq.calibration.rollout import Call, Span, publishing
from tests.toys import LEARN, recipe


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(33, 65)
        self.outer = nn.Linear(65, 33)

    def forward(self, x, t=None, *, caches=()):
        y = self.outer(torch.relu(self.inner(x)))
        return y if t is None else y * t


def numbers(recording):
    """The first number of every kept call's first argument."""
    return [int(batch.args[0].flatten()[0]) for batch in recording]


def filled(count, chunk=lambda i: 0, **options):
    recording = Recording(**options)
    for i in range(count):
        recording.add((torch.full((2, 3), float(i)),), {}, chunk(i))
    return recording


def test_arguments_are_recorded_as_they_were_at_the_call():
    model, x = Denoiser(), torch.randn(2, 5, 33)
    cache = torch.zeros(3)
    with record(model) as calls, torch.no_grad():
        for i in range(3):
            model(x + i, t=torch.tensor(0.5), caches=[cache])
            cache += 1
    model(x)
    batches = list(calls)
    assert len(batches) == len(calls) == 3
    for i, batch in enumerate(batches):
        assert torch.equal(batch.args[0], x + i)
        assert batch.kwargs["t"] == 0.5
        assert batch.kwargs["caches"][0].eq(i).all()


def test_batches_are_copies_so_that_a_model_may_write_to_them():
    recording = filled(1)
    next(iter(recording)).args[0].zero_().add_(7)
    assert numbers(recording) == [0]
    assert next(iter(recording.to("meta"))).args[0].device.type == "meta"


def test_a_recording_calibrates_a_model(tmp_path):
    model = Denoiser().eval()
    with record(model) as calls, torch.inference_mode():
        for _ in range(3):
            model(torch.randn(4, 33), t=torch.tensor(2.0).reshape(1))
    calls.save(tmp_path / "calls.safetensors")
    recordings = calls, Recording.load(tmp_path / "calls.safetensors")
    modules = [fxq.quantize(model, given, recipe(methods=LEARN), progress=False) for given in recordings]
    batch = next(iter(calls))
    x, t = batch.args[0], batch.kwargs["t"]
    want = model(x, t=t)
    got, reloaded = (module(x, t=t) for module in modules)
    assert torch.equal(got, reloaded)
    assert (got - want).pow(2).mean() < 0.01 * want.pow(2).mean()


def test_the_hook_is_gone_after_an_error():
    model = Denoiser()
    with pytest.raises(ZeroDivisionError), record(model) as calls:
        _ = 1 // 0
    model(torch.ones(1, 33))
    assert len(calls) == 0


def test_calls_can_be_left_out_and_labelled():
    model = Denoiser()
    options = {"keep": lambda args, kwargs: len(args[0]) > 1, "chunk": lambda args, kwargs: len(args[0]) // 2}
    with record(model, **options) as calls:
        for rows in (1, 2, 3, 4, 5):
            model(torch.ones(rows, 33))
    assert [(len(batch.args[0]), batch.chunk) for batch in calls] == [(2, 1), (3, 1), (4, 2), (5, 2)]
    assert calls.chunks == {1: 2, 2: 2}
    assert calls.seen == {1: 2, 2: 2}


def test_the_chunk_a_rollout_publishes_is_taken():
    model = Denoiser()
    with record(model) as calls, publishing(Call(0, "denoise", (Span(4, 0, (12, 15), 1000.0),), 8)):
        model(torch.ones(1, 33))
    assert [batch.chunk for batch in calls] == [4]


# Bounds


@pytest.mark.parametrize(("count", "room"), [(3, 5), (5, 5), (200, 5), (200, 1)])
def test_no_more_calls_are_kept_than_asked_for_in_their_order(count, room):
    recording = filled(count, max_calls=room)
    assert len(recording) == min(count, room)
    assert numbers(recording) == sorted(set(numbers(recording)))
    assert recording.seen == {0: count}


def test_bytes_are_bounded_too():
    recording = filled(100, max_calls=50, max_bytes=10 * 24)
    assert len(recording) == 10


def test_chunks_share_the_room_evenly_whatever_their_order():
    in_turn = filled(700, chunk=lambda i: i % 7, max_calls=22)
    one_after_another = filled(700, chunk=lambda i: i // 100, max_calls=22)
    for recording in (in_turn, one_after_another):
        assert len(recording) == 22
        assert set(recording.chunks) == set(range(7))
        assert max(recording.chunks.values()) - min(recording.chunks.values()) <= 1


@pytest.mark.parametrize("limit", [{"max_calls": 8}, {"max_calls": 100, "max_bytes": 8 * 24}], ids=["calls", "bytes"])
@pytest.mark.parametrize("chunk", [lambda i: 0, lambda i: i // 20], ids=["one chunk", "two chunks"])
def test_every_call_of_a_chunk_has_the_same_chance(limit, chunk):
    kept = collections.Counter()
    trials = 600
    for seed in range(trials):
        kept.update(numbers(filled(40, chunk=chunk, seed=seed, **limit)))
    assert sum(kept.values()) == 8 * trials
    deviation = (8 / 40 * (1 - 8 / 40) / trials) ** 0.5
    assert max(abs(kept[i] / trials - 8 / 40) for i in range(40)) < 4.5 * deviation


def test_the_same_seed_keeps_the_same_calls():
    assert numbers(filled(100, max_calls=5, seed=3)) == numbers(filled(100, max_calls=5, seed=3))
    assert numbers(filled(100, max_calls=5, seed=3)) != numbers(filled(100, max_calls=5, seed=4))


def test_a_call_larger_than_the_room_is_refused():
    with pytest.raises(RecordError, match=r"call 0 has 24 bytes of arguments, max_bytes is 23; raise it"):
        filled(1, max_bytes=23)


@pytest.mark.parametrize("limits", [{"max_calls": 0}, {"max_bytes": 0}])
def test_a_recording_without_room_is_refused(limits):
    with pytest.raises(RecordError, match="expected at least one of each"):
        Recording(**limits)


# Storing

CALL = (
    (torch.randn(2, 3), 4, 2.5, None, "flow", True, [torch.ones(0, 3), (torch.tensor(3),)], torch.Size([2, 3])),
    {
        "nested": {"k": [torch.arange(3), torch.tensor([True])], 5: None},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "repeated": torch.ones(1, 3).expand(4, 3),
        "infinite": float("inf"),
    },
)


def assert_same(got, want):
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, tuple | list):
        assert type(got) is (list if isinstance(want, list) else tuple) and len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == want and type(got) is type(want)


def test_saved_calls_come_back_as_they_were(tmp_path):
    recording = Recording()
    recording.add(*CALL, chunk=2)
    recording.add((torch.ones(1),), {}, chunk=0)
    recording.save(tmp_path / "calls.safetensors")
    loaded = Recording.load(tmp_path / "calls.safetensors")
    assert (loaded.seen, loaded.chunks) == ({2: 1, 0: 1}, {0: 1, 2: 1})
    for one in (recording, loaded):
        first, second = list(one)
        assert_same(first.args, CALL[0])
        assert_same(dict(first.kwargs), CALL[1])
        assert (first.chunk, second.chunk) == (2, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["calls.safetensors"]


class Mask:
    pass


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Mask(), r"call 0\[1\]\['x'\]\[1\] is a Mask; only tensors"),
        (torch.ones(2, dtype=torch.complex64), r"is a tensor of torch.complex64"),
        (torch.ones(2, 2).to_sparse(), r"torch.sparse_coo; expected a dense one"),
        ({(1, 2): 3}, "is a dict; only tensors"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place(value, reason):
    with pytest.raises(RecordError, match=reason):
        Recording().add((), {"x": [1, value]})


def test_a_recording_of_nothing_is_not_written(tmp_path):
    with pytest.raises(RecordError, match="nothing was recorded"):
        Recording().save(tmp_path / "calls.safetensors")
    assert not list(tmp_path.iterdir())


TREE = {"tuple": [{"tuple": [{"tensor": "0"}]}, {"dict": []}]}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "no recording of calls"),
        ({"calls": "["}, "cannot be read: JSONDecodeError"),
        ({"calls": json.dumps([{"index": 0, "chunk": 0, "tree": {"code": "x"}}])}, "unknown kind 'code'"),
        ({"calls": json.dumps([{"index": 0, "chunk": 0, "tree": {"dtype": "load"}}])}, "unknown kind 'dtype'"),
        ({"calls": json.dumps([{"index": 0, "chunk": 0, "tree": {"tuple": [{"tensor": "5"}]}}])}, "KeyError: '5'"),
        ({"calls": json.dumps([{"index": 0, "chunk": 0, "tree": 3}])}, "cannot be read: AttributeError"),
        ({"calls": json.dumps([{"chunk": 0, "tree": TREE}])}, "KeyError: 'index'"),
        ({"calls": json.dumps([3])}, "cannot be read"),
        ({"seen": "[3]"}, "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_no_recording_are_refused(tmp_path, metadata, reason):
    facts = {"format": "fxq calls 1", "seen": "[]", "calls": "[]"} | metadata if metadata else {}
    save_file({"0.0": torch.ones(1)}, tmp_path / "calls.safetensors", metadata=facts)
    with pytest.raises(RecordError, match=reason):
        Recording.load(tmp_path / "calls.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_damaged_and_missing_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "calls.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match=r"calls\.safetensors cannot be read"):
        Recording.load(tmp_path / "calls.safetensors")
