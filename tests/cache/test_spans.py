"""Encoded spans in memory that grows: what is shared, what is copied, what a fork keeps."""

import pytest
import torch

from fxq.cache.codecs import Klt, PerToken
from fxq.cache.codecs.record import RecordError
from fxq.cache.spans import Spans


def encoded(codec, count, seed=0):
    """Records of spans of 8 tokens."""
    x = torch.randn(2, 8 * count, 2, 16, generator=torch.Generator().manual_seed(seed))
    memory, found = {}, []
    for part in x.split(8, 1):
        record, memory = codec.encode(part, "keys", memory)
        found.append(record)
    return found


def grown(records):
    spans = Spans.of(records[0])
    for record in records[1:]:
        spans = spans.appended(record)
    return spans


@pytest.mark.parametrize("codec", [PerToken(2, 16), Klt(1.0)], ids=lambda c: c.name)
def test_spans_are_those_that_came_in(codec):
    records = encoded(codec, 5)
    found = grown(records).without(2)
    assert found.record.spans == 3 and found.record.tokens == 24
    for got, want in zip(found.records, records[2:], strict=True):
        assert all(torch.equal(got.tensors[name], want.tensors[name]) for name in want.tensors)


def test_many_spans_are_copied_a_few_times_each():
    records = encoded(PerToken(2, 16), 60)
    spans = grown(records)
    codes = spans.grown["codes"]
    assert codes.buffer.moved <= 3 * codes.tensor.numel()  # put together anew for each: 30 times
    assert 0 < spans.reserved <= 0.6 * spans.record.nbytes


def test_a_window_of_spans_needs_bounded_memory():
    records = encoded(PerToken(2, 16), 60)
    spans = grown(records[:3])
    for record in records[3:]:
        spans = spans.appended(record).without(1)
    assert spans.record.spans == 3 and spans.reserved <= 3 * spans.record.nbytes


def test_two_continuations_of_one_do_not_disturb_each_other():
    records, others = encoded(PerToken(2, 16), 4), encoded(PerToken(2, 16), 4, seed=1)
    start = grown(records[:2])
    first, second = start.appended(records[2]), start.appended(others[2])
    for found, want in ((first, records[2]), (second, others[2]), (first.appended(records[3]), records[3])):
        assert torch.equal(found.records[-1].tensors["codes"], want.tensors["codes"])
    assert start.record.spans == 2


def test_what_is_stored_once_must_be_the_same():
    with pytest.raises(RecordError, match="mean is stored once"):
        grown([encoded(Klt(1.0), 1)[0], encoded(Klt(1.0), 1, seed=1)[0]])
    with pytest.raises(RecordError, match="different codecs"):
        grown([encoded(Klt(1.0), 1)[0], encoded(PerToken(2, 16), 1)[0]])
