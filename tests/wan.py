"""A Wan pipeline of diffusers and transformers with tiny sizes, saved as people have it."""

import pathlib

import pytest
import torch

from fxq.shadowed import answer_transformers

WORDS = ("a", "cat", "dog", "runs", "sits", "red", "small", "on", "the", "grass")
TEXT_DIM, TEXT_LEN, CHANNELS = 24, 12, 16


answer_transformers()


def tokenizer():
    """Words with an end-of-sequence token, as that of UMT5 has it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text_encoder(text_dim=TEXT_DIM):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.UMT5Config(
        vocab_size=3 + len(WORDS), d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.UMT5EncoderModel(config).eval()


def vae(**options):
    """Wan's VAE."""
    import diffusers

    torch.manual_seed(2)
    sizes = {"base_dim": 8, "num_res_blocks": 1, "z_dim": CHANNELS} | options
    model = diffusers.AutoencoderKLWan(**sizes).eval()
    return model.requires_grad_(False)


def transformer():
    import diffusers

    torch.manual_seed(3)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, freq_dim=16, ffn_dim=48, num_layers=2, cross_attn_norm=True,
    ).eval()  # fmt: skip


def pipeline():
    import diffusers

    pytest.importorskip("ftfy")
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer(),
    )


def save(folder: pathlib.Path) -> pathlib.Path:
    """A pipeline's folder."""
    pipeline().save_pretrained(folder)
    return folder


LOOP = ["--model", "causal-wan", "--frames", "6", "--height", "4", "--width", "6", "--device", "cpu"]
"""Options of videos of two chunks: 21 frames of 32 x 48."""


def folders(tmp_path_factory):
    """A pipeline's folder and a W8A8 bundle of its transformer, made once a process."""
    from typer.testing import CliRunner

    from fxq.cli import app

    root = tmp_path_factory.getbasetemp() / "wan"
    if not root.exists():
        pipe = save(root / "pipe")
        words = ["--checkpoint", str(pipe / "transformer"), "--recipe", "w8a8-dynamic", "--quiet"]
        done = CliRunner().invoke(app, ["quantize", *LOOP, *words, "--out", str(root / "w8")])
        assert done.exit_code == 0, done.output
    return root / "pipe", root / "w8"
