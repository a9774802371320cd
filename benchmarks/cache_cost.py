"""What an encoded cache costs at the shapes of Wan 1.3B on this CPU: one layer, one span of eight chunks behind it.

python benchmarks/cache_cost.py --out benchmarks/results/cache_cost.json

Everything is measured in one run, round by round one after the other; figures are medians of rounds, in seconds of
processor time of one thread. Attention to an encoded span runs right behind attention to the same one in bfloat16, and
their ratio is the median of those of the rounds. A chunk's compute is five calls of the layer: its linears and its
attention to the whole history, all in bfloat16. A span is encoded (``commit``) once in eight chunks, keys rotated back
before; the first one of a video, measured once, has no centroids or basis to begin with. Decoding happens in every
call, inside ``fxq::attention_packed``: ``unpack`` is the same work into memory (keys rotated, values of ``Klt`` as
coefficients), ``decode`` that of the codecs in torch, for modules that were not packed and CPUs without native kernels.
``--rows`` and other sizes are for trying it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from fxq.cache.codecs import PRESETS, Klt, PerToken
from fxq.cache.codecs.codec import Codec, Memory
from fxq.cache.codecs.record import Record
from fxq.cache.named import codecs_text
from fxq.environment import environment
from fxq.kernels import attention, attention_packed, native
from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.encoded.sides import Reader
from fxq.kernels.attention.spans import coefficients, parts
from fxq.models.wan_rotary import WanRotary

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a layer and its cache: ``rows`` x ``columns`` tokens a frame, ``chunk`` frames, ``span`` chunks."""

    heads: int = 12
    width: int = 128
    hidden: int = 8960
    text: int = 512
    rows: int = 30
    columns: int = 52
    chunk: int = 3
    span: int = 8
    calls: int = 5

    @property
    def new(self) -> int:
        """Tokens of a call."""
        return self.rows * self.columns * self.chunk

    @property
    def old(self) -> int:
        """Tokens of a span."""
        return self.new * self.span


def codecs(sizes: Sizes) -> dict[str, Codec]:
    """Those that are measured; centroids and blocks as far as smaller sizes hold them."""
    qvg = PRESETS["qvg"]
    qvg = dataclasses.replace(qvg, centroids=min(256, sizes.old // 4), block=min(64, sizes.width))
    return {
        "int8": PRESETS["int8"],
        "int4": PerToken(4, 32, scale_dtype="bfloat16"),
        "qvg": qvg,
        "klt 1 bit": Klt(1.0),
        "klt 1 bit, calibrated": Klt(1.0, fit="model"),
    }


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Processor time of one call on one thread, which others that share the machine hardly change, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def tokens(count: int, sizes: Sizes, seed: int) -> torch.Tensor:
    """Keys or values [1, count, heads, head_dim] of low rank with a mean, as those of models are."""
    random, heads, width = torch.Generator().manual_seed(seed), sizes.heads, sizes.width
    factors = torch.randn(heads, 16, width, generator=random)
    x = torch.einsum("thr,hrd->thd", torch.randn(count, heads, 16, generator=random), factors)
    x = x + torch.randn(heads, width, generator=random) * 4 + 0.3 * torch.randn(count, heads, width, generator=random)
    return (x / 8).unsqueeze(0).bfloat16()


def linears(sizes: Sizes) -> Callable[[], object]:
    """The products of one layer in one call: self-attention, cross-attention without its text, FFN."""
    rows, dim = sizes.new, sizes.heads * sizes.width
    x, hidden = torch.randn(rows, dim).bfloat16(), torch.randn(rows, sizes.hidden).bfloat16()
    square = [torch.randn(dim, dim).bfloat16() for _ in range(6)]
    up, down = torch.randn(sizes.hidden, dim).bfloat16(), torch.randn(dim, sizes.hidden).bfloat16()
    text = [torch.randn(1, sizes.text, sizes.heads, sizes.width).bfloat16()]

    def run() -> None:
        for weight in square:
            F.linear(x, weight)
        F.linear(x, up)
        F.linear(hidden, down)
        attention(x.view(1, rows, sizes.heads, sizes.width), text, text)

    return run


def measure(sizes: Sizes, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in seconds and their ratios, by codec."""
    new, old = sizes.new, sizes.old
    q, k, v = (tokens(new, sizes, seed) for seed in (1, 2, 3))
    recent = tokens(new, sizes, 4), tokens(new, sizes, 5)
    past = tokens(old, sizes, 6), tokens(old, sizes, 7)
    rotary, known = WanRotary(sizes.width, sizes.rows, sizes.columns), codecs(sizes)
    cos, sin = rotary.tables(sizes.span * sizes.chunk, 0)
    rotated = rotary(past[0], 0)
    begun = {n: (c.learned(past[0][0]), c.learned(past[1][0])) for n, c in known.items()}
    records, memories, firsts = {}, {}, {}
    for name, codec in known.items():
        firsts[name], ((keys, key_memory), (values, value_memory)) = timed(
            lambda codec=codec, name=name: encode(codec, (rotary(rotated, 0, inverse=True), past[1]), begun[name])
        )
        records[name], memories[name] = (keys, values), (key_memory, value_memory)

    def exact() -> None:
        attention(q, [rotated, recent[0], k], [past[1], recent[1], v])

    def arguments(name: str) -> AttentionPacked:
        stored = [[record.tensors[f.name] for f in record.fields] for record in records[name]]
        text = codecs_text(known[name], known[name])
        return AttentionPacked(q, [recent[0], k], [recent[1], v], *stored, cos, sin, text, old)

    def commit(name: str, memory: tuple[Memory, Memory]) -> Callable[[], object]:
        return lambda: encode(known[name], (rotary(rotated, 0, inverse=True), past[1]), memory)

    calls: dict[str, Callable[[], object]] = {"linears": linears(sizes)}
    for name, codec in known.items():
        given = arguments(name)
        calls |= {
            f"bf16 {name}": exact,
            f"attention {name}": lambda given=given: attention_packed(*given),
            f"decode {name}": lambda codec=codec, both=records[name]: decode(codec, both),
            f"commit {name}": commit(name, memories[name]),
        }
        calls[f"unpack {name}"] = (lambda given=given: unpacked(given)) if native.ready() else calls[f"decode {name}"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call)[0])
    found = {name: statistics.median(values) for name, values in times.items()}
    every = [second for name in known for second in times[f"bf16 {name}"]]
    plain = statistics.median(every)
    chunk = sizes.calls * (found["linears"] + plain)
    result = {"exact": {"linears": found["linears"], "attention": plain, "chunk": chunk}}
    result["exact"] |= {"attention, least": min(every), "attention, most": max(every)}
    for name in known:
        ratios = [a / b for a, b in zip(times[f"attention {name}"], times[f"bf16 {name}"], strict=True)]
        result[name] = {
            "attention": found[f"attention {name}"],
            "attention over bf16": statistics.median(ratios),
            "commit": found[f"commit {name}"],
            "commit, share of its chunk": found[f"commit {name}"] / chunk,
            "commit, share of the span's compute": found[f"commit {name}"] / (sizes.span * chunk),
            "first commit, share of the span's compute": firsts[name] / (sizes.span * chunk),
            "unpack": found[f"unpack {name}"],
            "unpack, share of a chunk": sizes.calls * found[f"unpack {name}"] / chunk,
            "decode": found[f"decode {name}"],
        }
        if (few := coefficients(arguments(name), next(parts(arguments(name))))) is not None:
            result[name]["coefficients of values"] = few.x.shape[-1]
    return result


def unpacked(a: AttentionPacked) -> None:
    """What attention decodes of the keys and values of one call, in memory."""
    keys, values = Reader(a, "keys"), Reader(a, "values", short=True)
    for part in parts(a):
        keys.dense(part)
        values.dense(part)


def encode(
    codec: Codec, past: tuple[torch.Tensor, torch.Tensor], memories: tuple[Memory, Memory]
) -> tuple[tuple[Record, Memory], tuple[Record, Memory]]:
    """Keys and values of one span, with what the span before left: centroids, a basis."""
    return codec.encode(past[0], "keys", memories[0]), codec.encode(past[1], "values", memories[1])


def decode(codec: Codec, records: tuple[Record, Record]) -> None:
    """The same, back."""
    codec.decode(records[0], "keys")
    codec.decode(records[1], "values")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    torch.set_num_threads(1)
    with torch.inference_mode():
        result = measure(sizes, options.rounds)
    for name, row in result.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    if options.out:
        own = [f"--{n} {v}" for n, v in dataclasses.asdict(sizes).items() if v != getattr(Sizes(), n)]
        command = " ".join(
            ["python benchmarks/cache_cost.py", f"--out {options.out}", f"--rounds {options.rounds}", *own]
        )
        facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment()}
        text = json.dumps(facts | {"sizes": dataclasses.asdict(sizes), "layer": result}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
