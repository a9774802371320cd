"""What is stored of a span: declared once, checked, cut, joined and counted by that."""

import pytest
import torch

from fxq.cache.codecs.record import Field, Record, RecordError, Shape
from fxq.cache.spans import Spans

SHAPE = Shape(2, 8, 6)
FIELDS = (
    Field("codes", torch.uint8, "token", (2, 4)),
    Field("scale", torch.bfloat16, "span", (2,)),
    Field("mean", torch.float32, "video", (8,)),
    Field("table", torch.float32, "model", (3,)),
)


def tensors(spans=1, batch=2):
    return {
        "codes": torch.arange(batch * spans * 6 * 8, dtype=torch.int64).view(batch, spans * 6, 2, 4).to(torch.uint8),
        "scale": torch.rand(batch, spans, 2).to(torch.bfloat16),
        "mean": torch.ones(batch, 8),
        "table": torch.zeros(3),
    }


def test_spans_are_cut_and_joined():
    record = Record(FIELDS, tensors(3), SHAPE)
    assert (record.batch, record.spans, record.tokens) == (2, 3, 18)
    again = Spans.of(record.spans_of(0, 1)).appended(record.spans_of(1, 3)).record
    assert all(torch.equal(again.tensors[name], record.tensors[name]) for name in record.tensors)


def test_bytes_are_those_of_the_tensors_of_the_videos():
    record = Record(FIELDS, tensors(3), SHAPE)
    assert record.nbytes == 2 * (3 * 6 * 8 + 3 * 2 * 2 + 8 * 4)
    assert record.nbytes == 2 * sum(field.nbytes(18, 3) for field in FIELDS)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("codes", torch.zeros(2, 6, 2, 4), "codes is torch.float32"),
        ("codes", torch.zeros(2, 6, 2, 5, dtype=torch.uint8), "expected torch.uint8 per token"),
        ("scale", torch.zeros(2, 2, 2, dtype=torch.bfloat16), "does not hold 2 videos of 1 spans"),
        ("scale", torch.zeros(3, 1, 2, dtype=torch.bfloat16), "does not hold 2 videos"),
    ],
)
def test_a_tensor_that_was_not_declared_is_refused_by_name(name, tensor, message):
    with pytest.raises(RecordError, match=message):
        Record(FIELDS, tensors() | {name: tensor}, SHAPE)


def test_what_is_stored_once_must_agree():
    first, second = Record(FIELDS, tensors(), SHAPE), Record(FIELDS, tensors() | {"mean": torch.zeros(2, 8)}, SHAPE)
    with pytest.raises(RecordError, match="mean is stored once and differs"):
        Spans.of(first).appended(second)
    with pytest.raises(RecordError, match="different codecs or shapes"):
        Spans.of(first).appended(Record(FIELDS[:1], {"codes": tensors()["codes"]}, SHAPE))
