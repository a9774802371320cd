"""Ways to damage or forge a bundle, each a function of a folder and a random source."""

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import torch

from tests.attacks.corpus import FILES, edit_tensors, resign

DTYPES = (torch.float32, torch.int32, torch.int8, torch.float64, torch.float8_e4m3fn)
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 31, 32, 64, 127, 255, 4096, 65536, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63]
NUMBERS += [-(2**63), 10**30, 0.5, -0.0, 1e-40, 1e38, 1e308, float("inf"), float("nan")]
TEXTS = [
    "",
    "x",
    "lambda",
    "self",
    "__class__",
    "../x",
    "/etc/passwd",
    "float32",
    "cuda:0",
    "inf",
    "nan",
    "\ud800",
    "é",
]
TEXTS += ["a" * 5000, "aten.from_file.out", "aten.resize_.default", "aten.set_.source_Tensor", "operator.pow"]
TEXTS += [
    "[/x]",
    "[bold",
    "\x1b[2J",
    "\u005f_enum__",
    "os:system",
    "head.weight",
    "output",
    "d0",
    "0",
    "1e5",
    "\n",
    "\x00",
]
OPERATORS = sorted(
    {f"{s.name.replace('::', '.')}.{s.overload_name or 'default'}" for s in torch._C._jit_get_all_schemas()}
)
Random = random.Random


def places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below."""
    found, stack = [], [data]
    while stack:
        value = stack.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            found.append((value, key))
            stack.append(value[key])
    return found


def any_value(random: Random, others: list[tuple[Any, Any]]) -> Any:
    """Something that may stand in JSON."""
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice([None, True, False, [], {}, [[]], {"node": "x"}, {"list": []}, {"float": "nan"}])
    container, key = random.choice(others)
    return json.loads(json.dumps(container[key]))


def change_json(random: Random, data: Any) -> Any:
    """One structural change of a JSON value."""
    found = places(data)
    if not found:
        return any_value(random, [([0], 0)])
    container, key = random.choice(found)
    kind = random.randrange(9)
    value = container[key]
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, any_value(random, found))
    elif kind == 2 and isinstance(container, dict):
        container[random.choice([*TEXTS, *container])] = container.pop(key)
    elif kind == 3 and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = random.choice([value + 1, value - 1, -value, value * 2, str(value), [value]])
    elif kind == 4 and isinstance(container, list):
        other = random.randrange(len(container))
        container[key], container[other] = container[other], container[key]
    elif kind == 5 and isinstance(value, str) and "." in value:
        container[key] = random.choice(OPERATORS)
    elif kind == 6 and isinstance(value, str):
        position = random.randrange(len(value) + 1)
        container[key] = value[:position] + random.choice(TEXTS)[:20] + value[position + random.randrange(2) :]
    else:
        container[key] = any_value(random, found)
    return data


def _write_json(path: pathlib.Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def flip_bits(folder: pathlib.Path, random: Random) -> None:
    """A few bits of one file are another."""
    file = folder / random.choice(FILES)
    content = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 8)):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def cut(folder: pathlib.Path, random: Random) -> None:
    """A file ends early, or a piece of it is missing, doubled or zero."""
    file = folder / random.choice(FILES)
    content = file.read_bytes()
    start = random.randrange(len(content))
    stop = min(len(content), start + random.choice([1, 8, 100, 5000, len(content)]))
    middle = random.choice([b"", content[start:stop] * 2, bytes(stop - start)])
    file.write_bytes(content[:start] + middle + content[stop:])


def forge_header(folder: pathlib.Path, random: Random) -> None:
    """The header of the tensor file says something else."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if random.random() < 0.2:
        claimed = random.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        file.write_bytes(claimed.to_bytes(8, "little") + content[8:])
        return
    header = change_json(random, json.loads(content[8 : 8 + size]))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def forge_json(folder: pathlib.Path, random: Random) -> None:
    """The graph or the manifest says something else."""
    for _ in range(random.randint(1, 3)):
        file = folder / random.choice(FILES[:2])
        _write_json(file, change_json(random, json.loads(file.read_text())))


def forge_nodes(folder: pathlib.Path, random: Random) -> None:
    """Nodes of the graph call other operators, with other arguments, or read other nodes."""
    file = folder / "graph.json"
    data = json.loads(file.read_text())
    nodes = [node for node in data["nodes"] if node["op"] == "call_function"]
    for _ in range(random.randint(1, 2)):
        node, kind = random.choice(nodes), random.randrange(5)
        if kind == 0:
            node["target"] = random.choice(OPERATORS)
        elif kind == 1:
            node["target"] = random.choice(nodes)["target"]
        elif kind == 2 and node["args"]:
            node["args"][random.randrange(len(node["args"]))] = {"node": random.choice(data["nodes"])["name"]}
        elif kind == 3:
            node["args"].append(any_value(random, places(data)))
        else:
            node["kwargs"][random.choice(["dtype", "dim", "size", "out", "memory_format", "x"])] = any_value(
                random, places(data)
            )
    _write_json(file, data)


def forge_tensors(folder: pathlib.Path, random: Random) -> None:
    """Values, dtypes or shapes of tensors are others, and the manifest agrees."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for _ in range(random.randint(1, 2)):
            name = random.choice(sorted(tensors))
            tensor, kind = tensors[name], random.randrange(6)
            if kind == 0:
                tensors[name] = tensor.to(random.choice(DTYPES))
            elif kind == 1:
                tensors[name] = tensor.flatten().repeat(2)
            elif kind == 2:
                tensors[name] = tensor[list(range(len(tensor)))[::-1]] if tensor.ndim else tensor  # float8 has no flip
            elif kind == 3 and tensor.ndim:
                tensors[name] = tensor[: max(0, len(tensor) - 1)]
            else:
                flat = tensor.flatten().clone()
                value = random.choice([-1, 0, 1, 5000, -5, -(2**31), 2**31 - 1, float("nan"), float("inf"), 1e-45])
                if flat.numel() and (flat.is_floating_point() or (value == value and abs(value) < 2**31)):
                    low, high = (-128, 127) if flat.element_size() == 1 else (-(2**31), 2**31 - 1)
                    fits = flat.is_floating_point() or low <= value <= high
                    flat[random.randrange(flat.numel())] = value if fits else 1
                tensors[name] = flat.view(tensor.shape)
            tensors[name] = tensors[name].contiguous()

    edit_tensors(folder, edit, seal=False)


def splice(folder: pathlib.Path, random: Random, other: pathlib.Path | None = None) -> None:
    """One file is another bundle's."""
    if other is not None:
        name = random.choice(FILES)
        shutil.copy(other / name, folder / name)


MUTATORS: tuple[tuple[Callable[..., None], int], ...] = (
    (flip_bits, 2),
    (cut, 1),
    (forge_header, 2),
    (forge_json, 6),
    (forge_nodes, 4),
    (forge_tensors, 4),
    (splice, 1),
)


def mutate(folder: pathlib.Path, random: Random, others: list[pathlib.Path]) -> tuple[str, bool]:
    """Make a copied bundle a mutant; returns the way it was made, and whether the seal was made to fit as well."""
    chosen = random.choices([way for way, _ in MUTATORS], [weight for _, weight in MUTATORS])[0]
    if chosen is splice:
        splice(folder, random, random.choice(others))
    else:
        chosen(folder, random)
    hashes, seal = random.random() < 0.85, random.random() < 0.3
    if hashes:
        resign(folder, seal=seal)
    return chosen.__name__, hashes and seal
