"""Wan's text encoder, UMT5 of transformers, from a local folder: prompts in words to prompt embeddings."""

from __future__ import annotations

import contextlib
import functools
import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxq.models.checkpoints import CheckpointError
from fxq.models.prompts import PromptError, Prompts
from fxq.runtime.messages import first_line
from fxq.runtime.reading import ReadError, read_json
from fxq.runtime.streams import warn
from fxq.shadowed import answer_transformers

EXTRA = "wan"
"""Of fxq: the libraries that this needs."""
_CONFIG, _INDEX = "config.json", "model_index.json"
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
_KIND = "umt5"


def clean(prompt: str) -> str:
    """A prompt as Wan's own pipelines hand it to the tokenizer: repaired, unescaped, in single spaces.

    Raises:
        CheckpointError: when ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise _not_installed("prompts in words", error) from None
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _not_installed(what: str, error: ImportError) -> CheckpointError:
    return CheckpointError(f'{what} needs transformers and ftfy ({error}): pip install "fxq[{EXTRA}]"')


class TextEncoder:
    """A tokenizer and a ``UMT5EncoderModel``.

    Args:
        path: a folder of the encoder with its tokenizer in it or in ``tokenizer`` beside it, or of a pipeline, whose
            ``text_encoder`` and ``tokenizer`` are taken.
        device: where it runs; the CPU by default.
        dtype: of its weights; the file's by default.

    Raises:
        CheckpointError: when transformers is not installed, a folder lacks something or holds another model, or tensors
            are missing or do not fit. Nothing is downloaded, unpickled or executed from the folder.
    """

    def __init__(
        self, path: str | pathlib.Path, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        answer_transformers()
        try:
            import transformers
        except ImportError as error:
            raise _not_installed(f"the text encoder in {path}", error) from None
        folder, tokenizer = _folders(pathlib.Path(path))
        safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(tokenizer), **safely)
            with _quiet(transformers):
                model, found = transformers.UMT5EncoderModel.from_pretrained(
                    str(folder), use_safetensors=True, dtype=dtype or "auto", output_loading_info=True, **safely
                )
        except (OSError, ValueError, RuntimeError, ImportError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the text encoder in {folder} cannot be read: {first_line(error)}") from error
        faults = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
        named = {what: sorted(map(str, found.get(key) or ())) for what, key in faults.items()}
        if listed := "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in named.items() if names):
            raise CheckpointError(f"{folder} does not hold the UMT5 encoder of its {_CONFIG}. Tensors {listed}")
        self.model: Any = model.eval().requires_grad_(False).to(device or torch.device("cpu"))
        self.path = folder

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], text_len: int = 512) -> Prompts:
        """Embeddings of prompts in words, named by them; padding is left to :meth:`Prompts.batch`, which adds zeros.

        Args:
            prompts: cleaned here.
            text_len: most tokens; a longer prompt is cut off there, as Wan does, with a warning.

        Returns:
            Of each prompt [tokens, text_dim] in the encoder's dtype, on the CPU.

        Raises:
            PromptError: when there is none, or one is empty.
            CheckpointError: when ftfy is not installed.
        """
        cleaned = [clean(prompt) for prompt in prompts]
        if not cleaned or not all(cleaned):
            raise PromptError(f"{len(cleaned)} prompts with an empty one among them: expected words in each")
        rows = []
        for prompt in cleaned:
            if (long := len(self.tokenizer(prompt, add_special_tokens=True).input_ids)) > text_len:
                warn(f"prompt {prompt[:40]!r}... has {long} tokens: what is behind the first {text_len} is left out")
            # Padded to the full length and masked, as Wan does it: the same numbers to the last bit.
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                max_length=text_len,
                truncation=True,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            device = self.model.device
            mask = tokens.attention_mask.to(device)
            hidden = self.model(tokens.input_ids.to(device), mask).last_hidden_state
            rows.append(hidden[0, : int(mask.sum())].cpu())
        return Prompts(tuple(prompts), tuple(rows))


@functools.lru_cache(maxsize=4)
def encoded(
    path: pathlib.Path,
    texts: tuple[str, ...],
    text_len: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Prompts:
    """:meth:`TextEncoder.encode` by an encoder that is let go afterwards; asked again it is not loaded again.

    Raises:
        CheckpointError, PromptError: as there.
    """
    return TextEncoder(path, device, dtype).encode(texts, text_len)


def is_words(source: str) -> bool:
    """Whether prompts are a file of words, by its name."""
    return pathlib.Path(source).suffix.lower() == ".txt"


def read_texts(path: str | pathlib.Path) -> tuple[str, ...]:
    """Prompts in words: the lines of a text file that are not empty.

    Raises:
        PromptError: when it cannot be read as UTF-8, or has no line.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompts {path} cannot be read: {error}; expected UTF-8 text, a prompt a line") from error
    if not (prompts := tuple(line.strip() for line in lines if line.strip())):
        raise PromptError(f"prompts {path}: there is no prompt in it, expected one in each line")
    return prompts


def _folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Folder of the encoder and of its tokenizer."""
    if not root.is_dir():
        raise CheckpointError(f"{root} is no folder; expected a local one of a UMT5 encoder, or of a Wan pipeline")
    folder = root / "text_encoder" if (root / _INDEX).is_file() else root
    try:
        config = read_json(folder / _CONFIG, folder)
    except (OSError, ReadError) as error:
        raise CheckpointError(f"{folder / _CONFIG} cannot be read: {error}; expected that of a UMT5 encoder") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != _KIND:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, expected {_KIND!r}, which Wan's prompts are of"
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no safetensors; a pickle is not read, as that could run code: save the encoder with "
            "save_pretrained(safe_serialization=True)"
        )
    places = (folder, folder.parent / "tokenizer")
    for place in places:
        if any((place / name).is_file() for name in _TOKENIZER):
            return folder, place
    raise CheckpointError(f"no tokenizer in {' or '.join(map(str, places))}: expected one of {', '.join(_TOKENIZER)}")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
