"""What an encoded cache costs at the shapes of Wan 1.3B on this CPU: one layer, one span of eight chunks behind it.

python benchmarks/cache_cost.py --out benchmarks/results/cache_cost.json

Everything is measured in one run, round by round one after the other; ratios are of medians. A chunk's compute is five
calls of the layer: its linears and its attention to the whole history, all in bfloat16. A span is encoded (``commit``)
once in eight chunks; the first one of a video has no centroids or basis to begin with. Decoding happens in every call,
inside ``fxq::attention_packed``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fxq.cache.codecs import PRESETS, Klt
from fxq.cache.codecs.codec import Codec, Memory
from fxq.cache.codecs.record import Record
from fxq.cache.named import codecs_text
from fxq.environment import environment
from fxq.kernels import attention, attention_packed
from fxq.models.causal_wan import rope_tables

HEADS, WIDTH, FRAME, CHUNK, SPAN, CALLS = 12, 128, 1560, 3, 8, 5
HIDDEN, TEXT = 8960, 512
CODECS = {"int8": PRESETS["int8"], "qvg": PRESETS["qvg"], "klt 1 bit": Klt(1.0)}


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tokens(count: int, seed: int) -> torch.Tensor:
    """Keys or values [1, count, heads, head_dim] of low rank with a mean, as those of models are."""
    random = torch.Generator().manual_seed(seed)
    factors = torch.randn(HEADS, 16, WIDTH, generator=random)
    x = torch.einsum("thr,hrd->thd", torch.randn(count, HEADS, 16, generator=random), factors)
    x = x + torch.randn(HEADS, WIDTH, generator=random) * 4 + 0.3 * torch.randn(count, HEADS, WIDTH, generator=random)
    return (x / 8).unsqueeze(0).bfloat16()


def linears(rows: int) -> Callable[[], object]:
    """The products of one layer in one call: self-attention, cross-attention without its text, FFN."""
    dim = HEADS * WIDTH
    x, hidden = torch.randn(rows, dim).bfloat16(), torch.randn(rows, HIDDEN).bfloat16()
    square = [torch.randn(dim, dim).bfloat16() for _ in range(6)]
    up, down = torch.randn(HIDDEN, dim).bfloat16(), torch.randn(dim, HIDDEN).bfloat16()
    text = [torch.randn(1, TEXT, HEADS, WIDTH).bfloat16()]

    def run() -> None:
        for weight in square:
            F.linear(x, weight)
        F.linear(x, up)
        F.linear(hidden, down)
        attention(x.view(1, rows, HEADS, WIDTH), text, text)

    return run


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Medians in seconds and their ratios, by codec."""
    new, old = CHUNK * FRAME, SPAN * CHUNK * FRAME
    q, k, v = tokens(new, 1), tokens(new, 2), tokens(new, 3)
    recent = tokens(new, 4), tokens(new, 5)
    past = tokens(old, 6), tokens(old, 7)
    cos, sin = rope_tables(WIDTH, SPAN * CHUNK, 30, 52)
    dense = linears(new)
    first = {name: encode(codec, past, ({}, {})) for name, codec in CODECS.items()}
    records = {name: (keys[0], values[0]) for name, (keys, values) in first.items()}
    memories = {name: (keys[1], values[1]) for name, (keys, values) in first.items()}

    def exact() -> None:
        attention(q, [past[0], recent[0], k], [past[1], recent[1], v])

    def packed(name: str) -> Callable[[], object]:
        stored = [[record.tensors[f.name] for f in record.fields] for record in records[name]]
        text = codecs_text(CODECS[name], CODECS[name])
        return lambda: attention_packed(q, [recent[0], k], [recent[1], v], *stored, cos, sin, text, old)

    calls: dict[str, Callable[[], object]] = {"linears": dense, "attention bf16": exact}
    calls |= {f"attention {name}": packed(name) for name in CODECS}
    calls |= {f"first {name}": lambda codec=codec: encode(codec, past, ({}, {})) for name, codec in CODECS.items()}
    calls |= {f"commit {name}": lambda name=name: encode(CODECS[name], past, memories[name]) for name in CODECS}
    calls |= {f"decode {name}": lambda name=name: decode(CODECS[name], records[name]) for name in CODECS}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    found = {name: statistics.median(values) for name, values in times.items()}
    chunk = CALLS * (found["linears"] + found["attention bf16"])
    result = {"exact": {"linears": found["linears"], "attention": found["attention bf16"], "chunk": chunk}}
    for name in CODECS:
        result[name] = {
            "attention": found[f"attention {name}"],
            "attention over bf16": found[f"attention {name}"] / found["attention bf16"],
            "first commit, share of the span's compute": found[f"first {name}"] / (SPAN * chunk),
            "commit, share of the span's compute": found[f"commit {name}"] / (SPAN * chunk),
            "decode, share of a call": found[f"decode {name}"] / (chunk / CALLS),
        }
    return result


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
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        result = measure(options.rounds)
    for name, row in result.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    if options.out:
        command = f"python benchmarks/cache_cost.py --out {options.out} --rounds {options.rounds}"
        facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment()}
        options.out.write_text(json.dumps(facts | {"layer": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
