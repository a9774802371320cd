import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxq.models.prompts import PromptError, load_prompts


def load(source, **options):
    return load_prompts(source, text_dim=7, text_len=5, **options)


def write(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("file", ["prompts.safetensors", "prompts.npz"])
def test_files_give_single_prompts_and_batches_of_them(tmp_path, file):
    cat, dogs = torch.randn(3, 7), torch.randn(2, 5, 7)
    prompts = load(write(tmp_path / file, {"cat": cat, "dogs": dogs}))
    by_name = dict(zip(prompts.names, prompts.embeddings, strict=True))
    assert sorted(by_name) == ["cat", "dogs.0", "dogs.1"]
    assert len(prompts) == 3
    assert torch.equal(by_name["cat"], cat) and torch.equal(by_name["dogs.1"], dogs[1])


def test_a_batch_is_padded_with_zeros_to_the_length_of_the_model(tmp_path):
    short, full = torch.randn(3, 7), torch.randn(5, 7)
    prompts = load(write(tmp_path / "p.safetensors", {"a": short, "b": full}))
    batch = prompts.batch([1, 0, 1], 5)
    assert batch.shape == (3, 5, 7)
    assert torch.equal(batch[0], full) and torch.equal(batch[1, :3], short) and not batch[1, 3:].any()
    with pytest.raises(PromptError, match="'b' has 5 tokens, the model takes at most 4"):
        prompts.batch([1], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    assert load(write(tmp_path / "p.safetensors", {"a": torch.ones(1, 7, dtype=dtype)})).embeddings[0].dtype == dtype


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(3, 8), r"bad is float32 \[3, 8\], expected floating point \[tokens, 7\]"),
        (torch.ones(7), r"bad is float32 \[7\]"),
        (torch.ones(1, 1, 3, 7), r"float32 \[1, 1, 3, 7\]"),
        (torch.ones(6, 7), r"float32 \[6, 7\].* with 1 to 5 tokens"),
        (torch.ones(0, 7), r"float32 \[0, 7\]"),
        (torch.ones(3, 7, dtype=torch.int64), r"bad is int64 \[3, 7\], expected floating point"),
        (torch.full((3, 7), float("nan")), "bad has NaN or infinity"),
        (torch.ones(0, 3, 7), "no embedding in it"),
    ],
)
@pytest.mark.parametrize("file", ["p.safetensors", "p.npz"])
def test_embeddings_that_do_not_fit_are_refused_by_name(tmp_path, file, tensor, reason):
    with pytest.raises(PromptError, match=reason):
        load(write(tmp_path / file, {"bad": tensor}))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(PromptError, match="without objects"):
        load(tmp_path / "p.npz")


@pytest.mark.parametrize("file", ["p.safetensors", "p.npz"])
@pytest.mark.parametrize("content", [None, b"", b"some text that is no file of tensors"])
def test_damaged_and_missing_files_are_named(tmp_path, file, content):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(PromptError, match=rf"{re.escape(file)} cannot be read"):
        load(tmp_path / file)


MODULE = """
import torch
def batch(count, seed): return torch.full((count, 4, 7), float(seed))
def rows(count, seed): return [torch.ones(1 + i, 7) for i in range(count)]
def named(count, seed): return {"cat": torch.ones(2, 7)}
def text(count, seed): return "a cat"
def texts(count, seed): return ["a cat"]
constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "prompts_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "prompts_of_a_test"


@pytest.mark.parametrize(
    ("function", "names"),
    [("batch", ("prompt.0", "prompt.1")), ("rows", ("prompt.0", "prompt.1")), ("named", ("cat",))],
)
def test_a_function_of_the_user_gives_prompts(module, function, names):
    prompts = load(f"{module}:{function}", count=2, seed=9)
    assert prompts.names == names
    if function == "batch":
        assert prompts.embeddings[1].eq(9).all()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("text", "returned str, expected a tensor"),
        ("texts", "expected a tensor, a list of tensors or a dict"),
        ("absent", "no attribute 'absent'"),
        ("constant", "is a int, expected a function"),
    ],
)
def test_a_function_that_gives_no_prompts_is_refused(module, function, reason):
    with pytest.raises(PromptError, match=reason):
        load(f"{module}:{function}")


@pytest.mark.parametrize("source", ["prompts.txt", "prompts"])
def test_other_sources_are_refused(source):
    with pytest.raises(PromptError, match=r"expected a \.safetensors or \.npz file, or package\.module:function"):
        load(source)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(PromptError, match="No module named 'absent_module_of_a_test'"):
        load("absent_module_of_a_test:function")
