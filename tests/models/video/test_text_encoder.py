import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError
from fxq.models.video.text_encoder import TextEncoder, clean, encoded, is_words, read_texts
from tests import wan

pytest.importorskip("transformers")
pytest.importorskip("ftfy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder and a tokenizer beside it, as in a pipeline."""
    root = tmp_path_factory.mktemp("pipe")
    wan.text_encoder().save_pretrained(root / "text_encoder")
    wan.tokenizer().save_pretrained(root / "tokenizer")
    (root / "model_index.json").write_text("{}")
    return root


def test_embeddings_are_those_of_the_pipeline():
    pipe = wan.pipeline()
    encoder = TextEncoder.__new__(TextEncoder)
    encoder.tokenizer, encoder.model = pipe.tokenizer, pipe.text_encoder
    prompts = ["  a \n small &amp;amp; red cat", "the dog runs", "a " * 30]
    with pytest.warns(UserWarning, match=r"has 31 tokens: what is behind the first 12 is left out"):
        found = encoder.encode(prompts, wan.TEXT_LEN)
    want, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=wan.TEXT_LEN)
    assert [len(row) for row in found.embeddings] == [6, 4, 12]
    assert torch.allclose(found.batch([0, 1, 2], wan.TEXT_LEN), want, atol=1e-6)
    assert found.names == tuple(prompts)


def test_an_encoder_is_read_from_its_folder_and_from_a_pipelines(folder):
    want = wan.text_encoder()
    tokens = wan.tokenizer()("a cat", return_tensors="pt")
    hidden = want(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    for path in (folder, folder / "text_encoder"):
        encoder = TextEncoder(path)
        assert encoder.text_dim == wan.TEXT_DIM
        assert torch.allclose(encoder.encode(["a cat"], wan.TEXT_LEN).embeddings[0], hidden, atol=1e-6)
    assert TextEncoder(folder, dtype=torch.bfloat16).encode(["a cat"]).embeddings[0].dtype == torch.bfloat16


def test_an_encoder_that_was_asked_is_not_loaded_again(folder, monkeypatch):
    first = encoded(folder, ("a dog",), wan.TEXT_LEN, torch.device("cpu"))
    monkeypatch.setattr(TextEncoder, "__init__", None)
    assert encoded(folder, ("a dog",), wan.TEXT_LEN, torch.device("cpu")) is first


def test_prompts_are_cleaned_as_wan_cleans_them():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in ("  two  \t spaces\n", "&lt;b&gt; &amp;quot;", "schÃ¶n", "“quotes”", "plain"):
        assert clean(text) == prompt_clean(text)


def test_prompts_in_words_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\n  a dog, red \n", encoding="utf-8")
    assert read_texts(file) == ("a cat", "a dog, red") and is_words(str(file)) and not is_words("p.safetensors")
    file.write_text("\n \n")
    with pytest.raises(PromptError, match="there is no prompt in it, expected one in each line"):
        read_texts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="expected UTF-8 text, a prompt a line"):
        read_texts(file)


def test_no_prompt_and_empty_ones_are_refused(folder):
    encoder = TextEncoder(folder)
    for prompts in ([], ["a cat", "  "]):
        with pytest.raises(PromptError, match=f"{len(prompts)} prompts with an empty one"):
            encoder.encode(prompts)


def broken(folder, tmp_path, change):
    wan.text_encoder().save_pretrained(tmp_path / "text_encoder")
    wan.tokenizer().save_pretrained(tmp_path / "tokenizer")
    change(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def _another_kind(path):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | {"model_type": "t5"}))


def _a_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_tokenizer(path):
    (path.parent / "tokenizer" / "tokenizer.json").unlink()
    (path.parent / "tokenizer" / "tokenizer_config.json").unlink()


def _lost(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _misshapen(path):
    tensors = load_file(path / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] = torch.ones(3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_kind, "holds a model of type 't5', expected 'umt5'"),
        (_a_pickle, "has no safetensors; a pickle is not read"),
        (_no_tokenizer, "no tokenizer in .*: expected one of tokenizer.json"),
        (_lost, r"missing: encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"),
        (_misshapen, r"(of another shape: encoder\.final_layer_norm|cannot be read)"),
        (lambda path: (path / "config.json").unlink(), "cannot be read: .*; expected that of a UMT5 encoder"),
    ],
)
def test_what_is_no_such_encoder_is_refused(folder, change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        TextEncoder(broken(folder, tmp_path, change))


def test_no_folder_and_no_library_are_told(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is no folder; expected a local one"):
        TextEncoder(tmp_path / "Wan-AI" / "a-name-on-a-hub")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r'needs transformers and ftfy .*: pip install "fxq\[wan\]"'):
        TextEncoder(folder)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(CheckpointError, match=r'pip install "fxq\[wan\]"'):
        clean("a cat")


def test_code_in_the_folder_does_not_run(tmp_path):
    def add_code(path):
        for file, name in (
            (path / "config.json", "AutoModel"),
            (path.parent / "tokenizer" / "tokenizer_config.json", "AutoTokenizer"),
        ):
            content = json.loads(file.read_text())
            entry = ["mine.Tokenizer", None] if name == "AutoTokenizer" else "mine.Model"
            file.write_text(json.dumps(content | {"auto_map": {name: entry}}))
            (file.parent / "mine.py").write_text(
                f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\nTokenizer = Model\n"
            )

    path = broken(None, tmp_path, add_code)
    try:
        TextEncoder(path)
    except CheckpointError as error:
        assert "cannot be read" in str(error)
    assert not (tmp_path / "ran").exists()
