"""Record real calls of a model in the user's own pipeline, to calibrate on how it is actually driven."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxq.calibration.calibrate import Batch
from fxq.calibration.rollout import current_call
from fxq.dtypes import DTYPES
from fxq.runtime.reading import parse_json, read_header
from fxq.runtime.writable import whole_file

_FORMAT = "fxq calls 1"
_UNSTORABLE = (torch.complex32, torch.complex64, torch.complex128)

KeepCall = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]
ChunkOf = Callable[[tuple[Any, ...], Mapping[str, Any]], int]


class RecordError(ValueError):
    """A call whose arguments cannot be stored, or a file that is no recording."""


@dataclasses.dataclass(frozen=True)
class _StoredCall:
    """Arguments as a JSON tree whose leaves name tensors; ``index`` counts all calls of the recording."""

    index: int
    chunk: int
    tree: object
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def batch(self, device: torch.device) -> Batch:
        args, kwargs = _decode(self.tree, {n: t.to(device, copy=True) for n, t in self.tensors.items()})
        return Batch(args, kwargs, self.chunk)


class Recording:
    """Recorded calls, a calibration loader: iterates over copies, as :class:`fxq.Batch`, in the order of the calls.

    A sample of bounded size: at most ``max_calls`` calls and ``max_bytes`` bytes. Chunks share the room evenly, and
    within a chunk every call has the same chance to be kept (reservoir sampling).

    Args:
        max_calls: calls kept.
        max_bytes: bytes of tensors kept.
        seed: of the sampling.

    Raises:
        RecordError: when there is no room for one call.
    """

    def __init__(self, max_calls: int = 64, max_bytes: int = 4 << 30, seed: int = 0) -> None:
        if max_calls < 1 or max_bytes < 1:
            raise RecordError(f"max_calls {max_calls} and max_bytes {max_bytes}: expected at least one of each")
        self.max_calls, self.max_bytes = max_calls, max_bytes
        self.seen: Counter[int] = Counter()
        self._kept: dict[int, list[_StoredCall]] = {}
        self._sampled: set[int] = set()
        self._bytes = 0
        self._random = random.Random(seed)
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return sum(len(calls) for calls in self._kept.values())

    def __iter__(self) -> Iterator[Batch]:
        for call in self._calls():
            yield call.batch(self._device)

    def to(self, device: torch.device | str) -> Recording:
        """Yield batches on ``device`` from now on; returns the recording itself."""
        self._device = torch.device(device)
        return self

    def _calls(self) -> list[_StoredCall]:
        return sorted((call for calls in self._kept.values() for call in calls), key=lambda call: call.index)

    @property
    def chunks(self) -> dict[int, int]:
        """Kept calls by chunk."""
        return {chunk: len(calls) for chunk, calls in sorted(self._kept.items())}

    def add(self, args: tuple[object, ...], kwargs: Mapping[str, object], chunk: int = 0) -> None:
        """Offer a call to the sample; its tensors are copied to the CPU if it is kept.

        Raises:
            RecordError: an argument that is no tensor, number, string, None, dtype or device, nor a tuple, list or
                dict of them; or a call that alone is larger than ``max_bytes``.
        """
        index = self.seen.total()
        self.seen[chunk] += 1
        place = self._place(chunk)
        if place is None:
            return
        tensors: dict[str, Tensor] = {}
        tree = _encode((args, dict(kwargs)), f"call {index}", tensors)
        call = _StoredCall(index, chunk, tree, tensors)
        if call.bytes > self.max_bytes:
            raise RecordError(
                f"call {index} has {call.bytes} bytes of arguments, max_bytes is {self.max_bytes}; raise it, or record "
                "at a smaller size or with a shorter cache"
            )
        self._put(call, place)

    def _place(self, chunk: int) -> int | None:
        """Position in the chunk's calls to fill (their number: a new one), or None to let the call go."""
        calls = self._kept.setdefault(chunk, [])
        if chunk not in self._sampled:
            if len(self) < self.max_calls:
                return len(calls)
            if self._largest() > len(calls) + 1:
                self._drop()
                return len(calls)
            self._sampled.add(chunk)
        position = self._random.randrange(self.seen[chunk])
        return position if position < len(calls) else None

    def _largest(self) -> int:
        return max(len(calls) for calls in self._kept.values())

    def _drop(self) -> None:
        """Let a random call of the fullest chunk go; from then on that chunk only replaces."""
        largest = self._largest()
        chunk = self._random.choice([c for c, calls in sorted(self._kept.items()) if len(calls) == largest])
        self._sampled.add(chunk)
        calls = self._kept[chunk]
        self._bytes -= calls.pop(self._random.randrange(len(calls))).bytes

    def _put(self, call: _StoredCall, place: int) -> None:
        calls = self._kept[call.chunk]
        if place == len(calls):
            calls.append(call)
        else:
            self._bytes -= calls[place].bytes
            calls[place] = call
        self._bytes += call.bytes
        while self._bytes > self.max_bytes:
            self._drop()

    def save(self, path: str | pathlib.Path) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            RecordError: when nothing was recorded.
        """
        path, calls = pathlib.Path(path), self._calls()
        if not calls:
            raise RecordError("nothing was recorded: the model was not called, or keep refused every call")
        tensors = {f"{i}.{name}": tensor for i, call in enumerate(calls) for name, tensor in call.tensors.items()}
        facts = [{"index": call.index, "chunk": call.chunk, "tree": call.tree} for call in calls]
        seen = [[chunk, count] for chunk, count in sorted(self.seen.items())]
        metadata = {"format": _FORMAT, "calls": json.dumps(facts), "seen": json.dumps(seen)}
        with whole_file(path) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Recording:
        """Read a file of :meth:`save`; its tensors stay mapped to the file.

        Raises:
            RecordError: when it is no recording, or is damaged.
        """
        path = pathlib.Path(path)
        try:
            header = read_header(path)
            metadata, own = header.metadata, dict[str, dict[str, Tensor]]()
            with safe_open(path, "pt") as file:
                for name in header.tensors:
                    own.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = file.get_tensor(name)
            if metadata.get("format") != _FORMAT:
                raise RecordError(f"{path} is no recording of calls; expected a file written by Recording.save")
            facts = parse_json(metadata["calls"])
            recording = cls(max_calls=max(1, len(facts)))
            recording.seen.update({_whole(chunk): _whole(count) for chunk, count in parse_json(metadata["seen"])})
            for i, fact in enumerate(facts):
                tensors = own.get(str(i), {})
                call = _StoredCall(_whole(fact["index"]), _whole(fact["chunk"]), fact["tree"], tensors)
                call.batch(torch.device("meta"))
                recording._kept.setdefault(call.chunk, []).append(call)
        except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, RecordError):
                raise
            kind = type(error.__cause__ or error).__name__
            raise RecordError(f"recording {path} cannot be read: {kind}: {error}") from error
        return recording


@contextlib.contextmanager
def record(
    model: nn.Module,
    *,
    max_calls: int = 64,
    max_bytes: int = 4 << 30,
    keep: KeepCall | None = None,
    chunk: ChunkOf | None = None,
    seed: int = 0,
) -> Iterator[Recording]:
    """Record the arguments of real calls of ``model`` while the user's own pipeline runs.

    ``with fxq.record(pipe.transformer) as calls: pipe(prompt)``, then ``fxq.quantize(pipe.transformer, calls)``.
    Only calls of the module itself are seen (``model(...)``), not of its methods. The model is not changed.

    Args:
        model: the denoiser.
        max_calls: calls kept at most, see :class:`Recording`; at least one a chunk is wise.
        max_bytes: bytes kept at most.
        keep: ``keep(args, kwargs)`` says whether a call is eligible; all by default.
        chunk: ``chunk(args, kwargs)`` names the call's chunk, such as ``kwargs["current_start"] // 4680``; default: the
            chunk a :class:`fxq.Rollout` publishes, else 0.
        seed: of the sampling.

    Raises:
        RecordError: from the call that cannot be stored.
    """
    recording = Recording(max_calls, max_bytes, seed)

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if keep is not None and not keep(args, kwargs):
            return
        published = current_call()
        number = published.chunk if published is not None else 0
        recording.add(args, kwargs, int(chunk(args, kwargs)) if chunk is not None else number)

    handle = model.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    try:
        yield recording
    finally:
        handle.remove()


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> object:
    """``value`` as JSON; tensors are copied into ``tensors`` and named in the tree."""
    if isinstance(value, Tensor):
        return {"tensor": _store(value, place, tensors)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        value = tuple(value)
    if type(value) in (tuple, list):
        return {type(value).__name__: [_encode(v, f"{place}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(v, f"{place}[{key!r}]", tensors)] for key, v in value.items()]}
    raise RecordError(
        f"{place} is a {type(value).__name__}; only tensors, numbers, strings, None, dtypes, devices and tuples, lists "
        "and dicts of them can be stored: pass it in another way, or leave such calls out with keep"
    )


def _store(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided or tensor.dtype in _UNSTORABLE or tensor.is_quantized:
        raise RecordError(
            f"{place} is a tensor of {tensor.dtype}, {tensor.layout}; expected a dense one of real numbers"
        )
    name = str(len(tensors))
    with torch.inference_mode(False):  # a tensor of inference mode could not be used for learning later
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return name


def _whole(value: object) -> int:
    if type(value) is not int:
        raise RecordError(f"the recording has {str(value)[:80]!r} where a whole number stands")
    return value


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind in ("tuple", "list"):
        items = [_decode(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind == "device":
        return torch.device(content)
    if kind == "dtype" and content in DTYPES:
        return DTYPES[content]
    raise RecordError(f"the recording has an argument of unknown kind {kind!r}")
