import ctypes
import mmap
import os
import pathlib
import time

import pytest
import torch
from safetensors.torch import save_file

from fxq.models.checkpoints import read_tensors
from fxq.runtime.memory import residency
from fxq.runtime.memory.residency import (
    DiskError,
    Residency,
    give_back,
    mapped_tensor,
    peak_resident_bytes,
    resident_bytes,
    trim,
)

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="needs /proc/self/pagemap")


def filled(count, seed=0, dtype=torch.float32):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["torch.load", "safetensors"])
def private(request, tmp_path):
    """A privately mapped tensor of 8 MB and some, beside two small ones, and what it holds."""
    state = {"a": filled(1001), "big": filled((2 << 20) + 77, 1), "c": filled(77, 2)}
    path = tmp_path / ("w.pt" if request.param == "torch.load" else "w.safetensors")
    torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    return read_tensors(path), state


def mapped_files():
    """Bytes of mapped files that this process has in memory; what it allocates meanwhile is not among them."""
    (line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "RssFile" in line]
    return int(line.split()[1]) * 1024


def test_pages_of_a_mapped_weight_are_given_back_and_its_values_stay(private):
    mapped, state = private
    assert torch.equal(mapped["big"], state["big"])
    before = mapped_files()
    dropped = give_back(mapped["big"])
    assert mapped["big"].nbytes - 2 * PAGE <= dropped <= mapped["big"].nbytes
    assert before - mapped_files() > 0.9 * dropped
    assert torch.equal(mapped["big"], state["big"])


def test_pages_given_back_are_not_given_back_twice(private):
    mapped, _ = private
    mapped["big"].sum()
    assert give_back(mapped["big"]) > 0
    assert give_back(mapped["big"]) == 0


@pytest.mark.parametrize("at", [0, 1, 1000, 5 * PAGE // 4, (2 << 20) + 76])
def test_what_was_written_to_a_private_mapping_is_never_lost(private, at):
    mapped, state = private
    mapped["big"].sum()
    mapped["big"][at] = 3.5
    state["big"][at] = 3.5
    dropped = give_back(mapped["big"])
    assert 0 < dropped < mapped["big"].nbytes
    assert torch.equal(mapped["big"], state["big"])
    assert mapped["big"][at] == 3.5


def test_scattered_writes_survive_many_rounds(private):
    mapped, state = private
    generator = torch.Generator().manual_seed(5)
    for round_ in range(20):
        index = torch.randint(len(state["big"]), (50,), generator=generator)
        mapped["big"][index] = float(round_)
        state["big"][index] = float(round_)
        assert torch.equal(mapped["big"], state["big"])
        assert give_back(mapped["big"]) > 0
    assert torch.equal(mapped["big"], state["big"])


def test_a_wholly_rewritten_private_mapping_gives_nothing_back(private):
    mapped, _ = private
    mapped["big"].fill_(2.0)
    assert give_back(mapped["big"]) == 0
    assert bool((mapped["big"] == 2.0).all())


def test_neighbours_of_a_tensor_keep_their_pages(private):
    mapped, state = private
    for tensor in mapped.values():
        tensor.add_(0 * tensor)
    assert give_back(mapped["a"], mapped["c"]) == 0
    assert all(torch.equal(mapped[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3 << 18),
        torch.ones(5),
        torch.ones(0, 4),
        torch.tensor(1.0),
        torch.ones(4, 5, device="meta"),
        torch.ones(40, 50).to_sparse(),
    ],
    ids=["large", "small", "empty", "scalar", "meta", "sparse"],
)
def test_ordinary_memory_is_left_alone(tensor):
    before = tensor.clone()
    assert give_back(tensor) == 0
    assert tensor.is_meta or torch.equal(tensor.to_dense(), before.to_dense())


def test_fake_tensors_are_left_alone():
    with torch._subclasses.FakeTensorMode():
        assert give_back(torch.ones(1 << 20)) == 0


@pytest.mark.parametrize(
    "view", [lambda t: t[3:], lambda t: t[::3], lambda t: t[: 1 << 20].view(1024, 1024).T, torch.nn.Parameter]
)
def test_views_and_parameters_give_their_pages_back(private, view):
    mapped, state = private
    part = view(mapped["big"])
    part.detach().sum()
    assert give_back(part) > 1 << 20
    assert torch.equal(part, view(state["big"]))


def test_a_look_is_shared_by_many_calls_and_repeated_for_new_mappings(tmp_path, monkeypatch):
    looks = []
    look = Residency._look
    monkeypatch.setattr(Residency, "_look", lambda self: (looks.append(1), look(self)))
    held = Residency()
    tensors = [mapped_tensor(tmp_path / str(i), (1 << 19,), torch.float32) for i in range(3)]
    for tensor in tensors:
        tensor.fill_(1.0)
        assert held.give_back(tensor) == tensor.nbytes
    assert len(looks) == 1
    tensors.append(mapped_tensor(tmp_path / "new", (1 << 20,), torch.float32).fill_(1.0))
    assert held.give_back(tensors[-1]) == tensors[-1].nbytes
    assert len(looks) == 2
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_a_stale_look_never_drops_ordinary_memory(tmp_path):
    file = mapped_tensor(tmp_path / "w", (1 << 22,), torch.uint8)
    held, address = Residency(), file.data_ptr()
    assert held.mapped_bytes(file) == file.nbytes
    del file
    anonymous = [mmap.mmap(-1, 1 << 22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(4)]
    tensors = [torch.frombuffer(memory, dtype=torch.uint8) for memory in anonymous]
    assert address in [tensor.data_ptr() for tensor in tensors], "the address was not used again"
    for tensor in tensors:
        tensor.fill_(7)
        assert held.give_back(tensor) == 0
        assert bool((tensor == 7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int64], ids=str)
def test_a_mapped_tensor_keeps_what_is_written_in_its_file(tmp_path, dtype):
    tensor = mapped_tensor(tmp_path / "t", (37, 1033), dtype)
    assert (tmp_path / "t").stat().st_size == 37 * 1033 * dtype.itemsize
    assert os.stat(tmp_path / "t").st_blocks * 512 >= tensor.nbytes  # taken, not a hole
    assert not tensor.view(torch.uint8).any()
    values = filled(37 * 1033).mul(9).view(37, 1033).to(dtype)
    tensor.copy_(values)
    assert give_back(tensor) > 0
    assert torch.equal(tensor.view(torch.uint8), values.view(torch.uint8))
    assert (tmp_path / "t").read_bytes() == values.view(torch.uint8).numpy().tobytes()


def test_mapped_tensors_do_not_grow_the_process(tmp_path):
    before, held = resident_bytes(), Residency()
    tensors = []
    for i in range(16):
        tensors.append(mapped_tensor(tmp_path / str(i), (1 << 22,), torch.int8))
        tensors[-1].fill_(i)
        held.give_back(tensors[-1])
    assert resident_bytes() - before < 16 << 20
    assert [int(tensor[-1]) for tensor in tensors] == list(range(16))


def test_a_mapped_tensor_replaces_a_file_without_touching_tensors_of_the_old_one(tmp_path):
    old = mapped_tensor(tmp_path / "t", (5000,), torch.float32).fill_(1.0)
    new = mapped_tensor(tmp_path / "t", (2, 3), torch.float32)
    give_back(old)
    assert bool((old == 1).all()) and not new.any()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_mapped_tensors_may_be_empty_or_scalar(tmp_path, shape):
    tensor = mapped_tensor(tmp_path / "t", shape, torch.float32)
    assert tensor.shape == shape and not tensor.any()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DiskError, match=r"needs 1125899\.91 GB and .* GB left; choose another folder"):
        mapped_tensor(tmp_path / "t", (1 << 50,), torch.int8)
    assert not (tmp_path / "t").exists()


def test_nothing_happens_without_proc(tmp_path, monkeypatch):
    tensor = mapped_tensor(tmp_path / "t", (1 << 16,), torch.int8).fill_(1)
    for name in ("_MAPS", "_PAGES", "_STATUS"):
        monkeypatch.setattr(residency, name, tmp_path / "none")
    assert give_back(tensor) == 0
    assert resident_bytes() == peak_resident_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("path", "is_file"),
    [
        ("/home/a b/w.pt", True),
        ("/tmp/w (deleted)", True),
        ("/dev/shm/w", True),
        ("/memfd:w (deleted)", True),
        ("/dev/nvidia0", False),
        ("/dev/zero (deleted)", False),
        ("[heap]", False),
        ("anon_inode:[perf_event]", False),
        ("", False),
    ],
)
def test_device_memory_is_no_file(path, is_file):
    assert residency._is_file(path) == is_file


def test_the_peak_counts_memory_that_is_gone():
    before = peak_resident_bytes()
    assert before >= resident_bytes() - (1 << 20)
    size = max(0, before - resident_bytes()) + (64 << 20)
    torch.ones(size, dtype=torch.int8)
    assert peak_resident_bytes() > before + (32 << 20)


def test_freed_tensors_leave_the_process():
    kept = []
    for i in range(64):
        scratch = torch.full((8 << 20,), i, dtype=torch.int8)
        kept.append(scratch[: 1 << 16].clone())
        del scratch
    before = resident_bytes()
    trim()
    assert resident_bytes() <= before
    assert [int(tensor[-1]) for tensor in kept] == list(range(64))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_a_heap_with_gaps_shrinks():
    tensors = [torch.ones(1 << 17, dtype=torch.int8) for _ in range(1000)]
    before, last = resident_bytes(), tensors[-1]
    tensors.clear()
    trim()
    assert before - resident_bytes() > 100_000_000
    assert bool(last.all())


def test_giving_back_costs_little(tmp_path):
    tensors, held = [mapped_tensor(tmp_path / str(i), (1 << 20,), torch.int8) for i in range(100)], Residency()
    held.give_back(*tensors)
    start = time.perf_counter()
    for tensor in tensors:
        held.give_back(tensor)
    assert time.perf_counter() - start < 1.0
