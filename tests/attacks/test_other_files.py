"""Checkpoints, LoRAs, prompts, recordings and unfinished jobs of a stranger."""

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxq.calibration.record import RecordError, Recording
from fxq.models.checkpoints import CheckpointError, read_tensors
from fxq.models.lora import read_lora
from fxq.models.prompts import PromptError, load_prompts
from fxq.runtime.checkpoint import Checkpoint


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('pwned').touch()",))


class Large:
    """Takes memory when it is unpickled."""

    def __reduce__(self):
        return (bytearray, (10**12,))


@pytest.mark.parametrize("content", [Runs(), {"a": Runs()}, Large(), {"model": {"a": Large()}}])
def test_a_checkpoint_that_is_more_than_tensors_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is refused"):
        read_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


def repack(path, **changes):
    """Write a torch archive again, compressed or with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    packing = changes.pop("packing", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in entries.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2], content))


def test_a_packed_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    repack(path, packing=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"is packed, which torch.save never does"):
        read_tensors(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.empty(1 << 30, device="meta"),
        torch.eye(4).to_sparse(),
        torch.zeros(4, 4).as_strided((1 << 20,), (0,)),
    ],
    ids=["expanded", "meta", "sparse", "strided"],
)
def test_a_checkpoint_tensor_that_claims_more_than_it_has_is_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"is refused|cannot be read"):
        read_tensors(tmp_path / "x.pt")


def test_many_names_of_one_tensor_are_refused(tmp_path):
    tensor = torch.zeros(1 << 16)
    torch.save({f"a{i}": tensor for i in range(50)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="claims more elements than the file has"):
        read_tensors(tmp_path / "x.pt")
    torch.save({"a": tensor, "tied": tensor}, tmp_path / "y.pt")
    assert set(read_tensors(tmp_path / "y.pt")) == {"a", "tied"}


def lora(path, **tensors):
    save_file({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(3, 2)} | tensors, path)
    return path


CONFIGS = [
    "[" * 2000,
    "{}",
    '{"lora_alpha": "x"}',
    '{"lora_alpha": []}',
    '{"lora_alpha": 1, "lora_alpha": 2}',
    "\xff",
    "5",
]


@pytest.mark.parametrize("text", CONFIGS)
def test_a_lora_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"adapter_config.json"):
        read_lora(lora(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("x.alpha", torch.ones(3)),
        ("x.alpha", torch.ones(0)),
        ("x.lora_A.weight", torch.ones(0, 4)),
        ("x.lora_A.weight", torch.ones(2)),
    ],
)
def test_a_lora_with_tensors_of_other_shapes_is_refused(tmp_path, name, tensor):
    others = {"x.lora_B.weight": torch.ones(3, 0)} if not tensor.numel() and "lora" in name else {}
    with pytest.raises(CheckpointError, match="expected"):
        read_lora(lora(tmp_path / "x.safetensors", **{name: tensor}, **others))


def archive_of(path, entries, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def npy(shape, data, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


ARRAYS = {
    "claims more": npy((10**12, 8), bytes(32)),
    "claims less": npy((1, 4), bytes(64)),
    "bomb": npy((1 << 20, 8), bytes(32 << 20)),
    "objects": npy((1,), pickle.dumps(Runs()), "|O"),
    "negative": npy((-1, 8), bytes(32)),
    "header": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60000,
    "code": npy("__import__('os')", b""),
    "nothing": b"",
}


@pytest.mark.parametrize("case", ARRAYS)
def test_prompt_arrays_are_what_they_claim(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = archive_of(tmp_path / "p.npz", {"a.npy": ARRAYS[case]})
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(path, 8, 512)
    assert not (tmp_path / "pwned").exists()


def test_usual_prompt_arrays_are_read_packed_or_not(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    np.savez(tmp_path / "a.npz", x=array, y=np.asfortranarray(array))
    np.savez_compressed(tmp_path / "b.npz", x=array, y=np.asfortranarray(array))
    for name in ("a.npz", "b.npz"):
        prompts = load_prompts(tmp_path / name, 8, 512)
        assert prompts.names == ("x", "y")
        assert all(np.array_equal(e.numpy(), array) for e in prompts.embeddings)


TREES = {
    "deep": '{"tuple": [' * 300 + "]}" * 300,
    "attribute": json.dumps({"dtype": "load"}),
    "module": json.dumps({"dtype": "onnx"}),
    "device": json.dumps({"device": "nowhere"}),
    "keys": json.dumps({"dict": [[[1], {"value": 1}]]}),
}


@pytest.mark.parametrize("case", TREES)
def test_a_recorded_call_is_a_tree_of_tensors_and_constants(tmp_path, case):
    calls = f'[{{"index": 0, "chunk": 0, "tree": {TREES[case]}}}]'
    metadata = {"format": "fxq calls 1", "seen": "[[0, 1]]", "calls": calls}
    save_file({"0.0": torch.ones(1)}, tmp_path / "c.safetensors", metadata=metadata)
    with pytest.raises(RecordError, match=r"cannot be read|unknown kind"):
        Recording.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("seen", ["[[0, 1e308]]", '[["0", 1]]', "[[0]]", "{}", "[" * 500])
def test_counts_of_a_recording_are_whole_numbers(tmp_path, seen):
    call = {"index": 0, "chunk": 0, "tree": {"tuple": [{"tuple": [{"tensor": "0"}]}, {"dict": []}]}}
    metadata = {"format": "fxq calls 1", "seen": seen, "calls": json.dumps([call])}
    save_file({"0.0": torch.ones(1)}, tmp_path / "c.safetensors", metadata=metadata)
    if seen == "{}":
        assert len(Recording.load(tmp_path / "c.safetensors")) == 1
        return
    with pytest.raises(RecordError, match=r"cannot be read|whole number"):
        Recording.load(tmp_path / "c.safetensors")


def test_a_piece_of_a_job_that_is_no_plain_file_does_not_count(tmp_path):
    checkpoint = Checkpoint(tmp_path / "job")
    checkpoint.write("a", "key", {"x": torch.ones(3)})
    assert checkpoint.read("a", "key") is not None
    file = checkpoint.path("a")
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert checkpoint.read("a", "key") is None
    file.unlink()
    file.symlink_to("/dev/zero")
    assert checkpoint.read("a", "key") is None
    file.unlink()
    file.write_bytes(struct.pack("<Q", 2**62) + bytes(64))
    assert checkpoint.read("a", "key") is None
