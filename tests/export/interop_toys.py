"""Bundles of a small Wan and the interpreter that has the libraries of other runtimes."""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxq
from fxq.export.interop.layers import read_model, sqnr
from tests.toys import recipe, wan_rollout

WAN_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 32,
    "cross_attn_norm": True,
    "ffn_dim": 96,
    "freq_dim": 16,
    "in_channels": 3,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 3,
    "patch_size": [1, 2, 2],
    "text_dim": 32,
}
INTERPRETER = os.environ.get("FXQ_INTEROP_PYTHON", sys.executable)

RUNTIMES = pathlib.Path(sys.prefix) / "runtimes"
"""Where `make test` puts the libraries that read exports."""
SERVER = """
import contextlib, json, os, sys, traceback
import torch
for line in sys.stdin:
    asked = json.loads(line)
    said, told = os.pipe()
    if os.fork() == 0:
        os.close(said)
        os.dup2(told, 1)
        os.dup2(told, 2)
        os.chdir(asked["folder"])
        sys.argv = ["-c", *asked["arguments"]]
        code = 1
        try:
            exec(compile(asked["program"], "program", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)
    os.close(told)
    with os.fdopen(said) as pipe:
        text = pipe.read()
    _, status = os.wait()
    print(json.dumps([status, text]), flush=True)
"""
"""Runs the programs that come in lines of JSON, each in a fork of its own, and answers with exit code and output."""

CLOSE = """
import json, sys, torch
from safetensors.torch import load_file
def close(want, got, most=0.02):
    assert want.shape == got.shape, (want.shape, got.shape)
    error = float((want.double() - got.double()).norm())
    assert error <= most * float(want.double().norm()), error
"""

COMPRESSED = (
    CLOSE
    + """
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn
tensors, expected = load_file(sys.argv[1] + "/model.safetensors"), load_file(sys.argv[2])
config = json.load(open(sys.argv[1] + "/config.json"))["quantization_config"]
assert config.pop("quant_method") == "compressed-tensors"
config = QuantizationConfig.model_validate(config)
model = nn.Module()
for name in sorted({n.rpartition(".")[0] for n, t in expected.items() if n.endswith(".weight") and t.ndim == 2}):
    at = model
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(at, part):
            at.add_module(part, nn.Module())
        at = getattr(at, part)
    outputs, width = expected[name + ".weight"].shape
    at.add_module(leaf, nn.Linear(width, outputs))
apply_quantization_config(model, config)
compressor = ModelCompressor(quantization_config=config)
compressor.compress_model(model)
state = model.state_dict()
mine = {n: t for n, t in tensors.items() if n in state}
assert set(mine) == set(state), set(mine) ^ set(state)
for name, tensor in state.items():
    assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
model.load_state_dict(mine)
compressor.decompress_model(model)
names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
for name in names:
    close(expected[name + ".weight"], model.get_submodule(name).weight, float(sys.argv[3]))
print(json.dumps(names))
"""
)
"""Reads an exported folder with compressed-tensors and compares it with expected weights, within a relative error."""


def make_bundle(path, bits, keep=()):
    """A small Wan whose layers of the patterns ``keep`` stay in floating point."""
    rollout = wan_rollout(seeds=(1,), frames=2)
    chosen = recipe(bits)
    rules = tuple(fxq.Rule(pattern, None, "a test keeps it") for pattern in keep)
    chosen = dataclasses.replace(chosen, rules=(*rules, *chosen.rules))
    return fxq.save(fxq.quantize(rollout.denoiser, rollout, chosen, progress=False), path, fingerprint=False)


def original_weights():
    """The float weights that :func:`make_bundle` quantizes."""
    return wan_rollout(seeds=(1,), frames=2).denoiser.state_dict()


def forms(file):
    """Dtype and shape of every tensor, and the metadata."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    found = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in load_file(file).items()}
    return found, metadata


class Apart:
    """A process without fxq in which programs run, each in a fork: torch is imported once and not by each of them."""

    def __init__(self):
        hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [INTERPRETER, "-u", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),
            env=hidden | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNTIMES)},
        )

    def run(self, program, folder, *arguments):
        """Exit code and output of a program."""
        asked = {"program": program, "folder": str(folder), "arguments": [*map(str, arguments)]}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


@functools.cache
def apart():
    found = Apart()
    atexit.register(found.close)
    return found


@functools.cache
def missing(*libraries):
    """Those of the libraries that the interpreter does not have."""
    code = f"from importlib.util import find_spec\nprint(*(name for name in {libraries} if find_spec(name) is None))"
    return run_apart(tempfile.gettempdir(), code).split()


def needs(*libraries):
    """Skips the test where one of the libraries is not installed."""
    if lacking := missing(*libraries):
        pytest.skip(f"{', '.join(lacking)} not installed: make test installs it, or set FXQ_INTEROP_PYTHON")


def run_apart(folder, program, *arguments):
    """What a program prints in a process that does not see fxq."""
    code, text = apart().run(program, folder, *arguments)
    assert code == 0, text
    return text


def expected_weights(bundle, style, path):
    """Float weights and biases that a bundle stands for, under a target's names."""
    model = read_model(bundle)
    tensors = {}
    for layer, stored in model.layers.items():
        name = model.naming.rename(layer, style)
        tensors[f"{name}.weight"] = stored.weight().contiguous()
        tensors[f"{name}.bias"] = stored.bias.float()
    for name, tensor in model.floats.items():
        tensors[model.naming.rename(name, style)] = tensor
    save_file(tensors, path)
    return tensors


def int8_product(x, integers, scale, bias):
    """A linear with rows of ``x`` rounded to int8 by their largest magnitude, as the int8 kernels of servers do it."""
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).round() @ integers.float().t() * step * scale.float().t() + bias.float()


def agreement(stored, got, x):
    """dB of a layer of the bundle over what a reader computes for it, on inputs x [rows, K]."""
    found = sqnr(torch.nn.functional.linear(x, stored.weight(), stored.bias.float()), got)
    return float("inf") if found is None else found


def read_json(file):
    return json.loads(file.read_text())


def relative(want, got):
    return float((want.double() - got.double()).norm() / want.double().norm())


BF16 = torch.bfloat16
