import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxq.export import files
from fxq.export.files import BundleError, whole_folder, write_tensors
from fxq.models.checkpoints import read_tensors
from fxq.runtime.memory.residency import DiskError, give_back, mapped_tensor, resident_bytes


def written_by_safetensors(tensors, path, metadata):
    """What the library itself writes, with the metadata sorted: the oracle."""
    storages, stored = set(), {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        own = own.clone() if own.untyped_storage().data_ptr() in storages else own
        storages.add(own.untyped_storage().data_ptr())
        stored[name] = own
    save_file(stored, path, metadata=dict(metadata))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


def every_dtype():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, dtype in enumerate(files._DTYPES):
        for j, shape in enumerate([(3, 5), (), (0, 4), (2, 1, 7)]):
            count = torch.Size(shape).numel() * dtype.itemsize
            high = 2 if dtype is torch.bool else 256
            raw = torch.randint(high, (count,), generator=generator, dtype=torch.uint8)
            found[f"{'zyx'[(i + j) % 3]}.{i}.{j}"] = raw.view(dtype).view(shape)
    return found


def shared_and_strided():
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    return {
        "all": base,
        "again": base,
        "part": base[3:7],
        "columns": base[:, 2:9:3],
        "turned": base.T,
        "expanded": base[:, :1].expand(12, 4),
        "overlapping": torch.as_strided(base, (5, 6), (2, 3)),
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


METADATA = {"fxq.z": "1", "format": "pt", "fxq.b": 'a "quoted"\nline', "a": "é\u2028\x7f\x01", "": ""}


@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["metadata", "bare"])
@pytest.mark.parametrize("piece", [1 << 26, 64, 23, 8], ids=lambda size: f"pieces of {size}")
@pytest.mark.parametrize("tensors", [every_dtype(), shared_and_strided()], ids=["dtypes", "strided"])
def test_the_bytes_are_those_of_safetensors(tmp_path, monkeypatch, tensors, piece, metadata):
    monkeypatch.setattr(files, "_PIECE", piece)
    write_tensors(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == written_by_safetensors(tensors, tmp_path / "theirs", metadata)


def test_safetensors_reads_it_back(tmp_path):
    tensors = shared_and_strided()
    write_tensors(tensors, tmp_path / "file.safetensors", METADATA)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("names", [["b", "a", "B", "é", "a.10", "a.9", "ab", "𝄞", "\uffee"], ['q"', "q\\", "q\n"]])
def test_names_are_ordered_and_written_as_safetensors_does(tmp_path, names):
    tensors = {name: torch.full((i + 1,), float(i)) for i, name in enumerate(names)}
    write_tensors(tensors, tmp_path / "ours", {"a": "b"})
    assert (tmp_path / "ours").read_bytes() == written_by_safetensors(tensors, tmp_path / "theirs", {"a": "b"})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_dtype_the_format_has_not_is_refused_with_the_tensor(tmp_path, dtype):
    with pytest.raises(BundleError, match=rf"tensor b is {dtype}, which a safetensors file cannot hold.*BF16"):
        write_tensors({"a": torch.ones(2), "b": torch.ones(2, dtype=dtype)}, tmp_path / "m", {})
    assert not (tmp_path / "m").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    endless = torch.ones(1, dtype=torch.int8).expand(1 << 50)
    with pytest.raises(DiskError, match=r"m needs 1125899\.91 GB and its disk has .* GB left"):
        write_tensors({"a": endless}, tmp_path / "m", {})
    assert not (tmp_path / "m").exists()


def memory_of_writing(tensors, path, monkeypatch):
    """Most memory above the start while a file is written, looked at after every piece."""
    highest, before = [0], resident_bytes()
    pieces = files._pieces

    def watched(tensor):
        for piece in pieces(tensor):
            yield piece
            highest[0] = max(highest[0], resident_bytes() - before)

    monkeypatch.setattr(files, "_pieces", watched)
    write_tensors(tensors, path, {})
    return highest[0]


def test_tensors_are_written_without_a_second_copy(tmp_path, monkeypatch):
    tensors = {str(i): torch.full((4 << 20,), float(i)) for i in range(8)}
    assert memory_of_writing(tensors, tmp_path / "m", monkeypatch) < 12 << 20
    assert [float(t[-1]) for t in load_file(tmp_path / "m").values()] == [float(i) for i in range(8)]


def test_a_large_strided_tensor_is_copied_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 1 << 20)
    base = torch.arange(8 << 20, dtype=torch.float32).view(2048, 4096)
    assert memory_of_writing({"turned": base.T}, tmp_path / "m", monkeypatch) < 12 << 20
    assert torch.equal(load_file(tmp_path / "m")["turned"], base.T)


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="needs /proc/self/pagemap")
def test_mapped_tensors_are_written_one_at_a_time_in_memory(tmp_path, monkeypatch):
    for i in range(8):
        give_back(mapped_tensor(tmp_path / f"{i}.bin", (16 << 20,), torch.int8).fill_(i))
    save_file({str(i): torch.full((4 << 20,), float(i)) for i in range(8)}, tmp_path / "in.safetensors")
    tensors = read_tensors(tmp_path / "in.safetensors")
    for i in range(8):
        tensors[f"m{i}"] = torch.from_file(str(tmp_path / f"{i}.bin"), shared=True, size=16 << 20, dtype=torch.int8)
    assert memory_of_writing(tensors, tmp_path / "m", monkeypatch) < 40 << 20
    found = load_file(tmp_path / "m")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_files_reach_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files.os, "fsync", lambda _: order.append("on disk"))
    monkeypatch.setattr(files, "_swap", lambda part, out: order.append("named"))
    with whole_folder(tmp_path / "out", ("a", "b"), "a test") as folder:
        order.clear()  # of what tried whether the place can be written
        for name in ("a", "b"):
            (folder / name).write_text("x")
    assert order == ["on disk", "on disk", "named"]


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m").write_text("old")
    endless = torch.ones(1, dtype=torch.int8).expand(1 << 50)
    with (
        pytest.raises(BundleError, match=r"cannot save .*out: .* GB left"),
        whole_folder(tmp_path / "out", ("m",), "a test") as folder,
    ):
        write_tensors({"a": endless}, folder / "m", {})
    assert (tmp_path / "out" / "m").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
