import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxq.models.causal_wan import CausalWan, CausalWanConfig, RMSNorm, rope_tables

SMALL = CausalWanConfig(
    dim=36, ffn_dim=50, num_heads=3, num_layers=2, freq_dim=20, text_dim=7, text_len=5, in_dim=3, out_dim=3
)


def official_shapes(dim, ffn_dim, layers):
    """Keys and shapes of a Self-Forcing checkpoint without its prefix."""
    shapes = {"patch_embedding.weight": (dim, 16, 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name, out, into):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    for name, out, into in (
        ("text_embedding.0", dim, 4096),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", dim, 256),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", 6 * dim, dim),
        ("head.head", 64, dim),
    ):
        linear(name, out, into)
    shapes["head.modulation"] = (1, 2, dim)
    for i in range(layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        linear(f"{block}.ffn.0", ffn_dim, dim)
        linear(f"{block}.ffn.2", dim, ffn_dim)
    return shapes


@pytest.mark.parametrize(
    ("config", "sizes", "keys", "linears", "billions"),
    [
        (CausalWanConfig.wan_1_3b(), (1536, 8960, 30), 825, 306, 1.419),
        (CausalWanConfig.wan_14b(), (5120, 13824, 40), 1095, 406, 14.29),
    ],
    ids=["1.3B", "14B"],
)
def test_state_dict_is_the_official_one(config, sizes, keys, linears, billions):
    with torch.device("meta"):
        model = CausalWan(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state == official_shapes(*sizes)
    assert len(state) == keys
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == linears
    assert not list(model.buffers())
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / 1e9 - billions) < 0.006


def small_model():
    torch.manual_seed(0)
    return CausalWan(SMALL).eval().requires_grad_(False)


def nothing(batch, config=SMALL):
    return [torch.zeros(batch, 0, config.num_heads, config.head_dim)] * config.num_layers


def run(model, x, t, prompt, start, cross=None, prefix=None):
    batch = x.shape[0]
    cross_k, cross_v = cross or (nothing(batch), nothing(batch))
    prefix_k, prefix_v = prefix or (nothing(batch), nothing(batch))
    text = prompt[:, :0] if cross else prompt
    tables = rope_tables(model.config.head_dim, x.shape[1], x.shape[3] // 2, x.shape[4] // 2, start)
    return model(x, t, text, cross_k, cross_v, prefix_k, prefix_v, *tables)


def block_causal_pass(model, x, t, prompt, chunk):
    """All frames at once, with a mask under which tokens of a chunk see that chunk and earlier ones."""
    frames, rows, columns = x.shape[1], x.shape[3] // 2, x.shape[4] // 2
    cos, sin = rope_tables(model.config.head_dim, frames, rows, columns)
    chunk_of_token = torch.arange(frames).repeat_interleave(rows * columns) // chunk
    hidden_future = chunk_of_token[None, :] > chunk_of_token[:, None]

    def self_attend(attn, h):
        q, k, v = attn.qkv(h, cos, sin)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden_future, -torch.inf).softmax(-1)
        return attn.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    e, e0 = model.embed_time(t)
    text, h = model.text_embedding(prompt), model.patchify(x)
    for block in model.blocks:
        h = block(h, e0, *block.cross_attn.kv(text), self_attend)
    return model.unpatchify(model.head(h, e), frames, x.shape[3], x.shape[4])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_with_a_prefix_equal_one_block_causal_pass(chunk):
    model = small_model()
    x, prompt = torch.randn(2, 3 * chunk, 3, 4, 10), torch.randn(2, 5, 7)
    t = torch.rand(2, 3 * chunk) * 1000
    whole = block_causal_pass(model, x, t, prompt, chunk)
    prefix, cross, parts = None, None, []
    for i in range(3):
        part = slice(i * chunk, (i + 1) * chunk)
        flow, k, v, cross_k, cross_v = run(model, x[:, part], t[:, part], prompt, i * chunk, cross, prefix)
        parts.append(flow)
        cross = (cross_k, cross_v)
        before_k, before_v = prefix or (nothing(2), nothing(2))
        prefix = (
            [torch.cat(pair, 1) for pair in zip(before_k, k, strict=True)],
            [torch.cat(pair, 1) for pair in zip(before_v, v, strict=True)],
        )
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)


def test_samples_of_a_batch_do_not_influence_each_other():
    model = small_model()
    x, t, prompt = torch.randn(3, 2, 3, 6, 4), torch.rand(3, 2) * 1000, torch.randn(3, 5, 7)
    together = run(model, x, t, prompt, 4)
    for i in range(3):
        alone = run(model, x[i : i + 1], t[i : i + 1], prompt[i : i + 1], 4)
        torch.testing.assert_close(alone[0], together[0][i : i + 1], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(alone[1][1], together[1][1][i : i + 1], atol=2e-6, rtol=1e-5)


def test_cached_text_gives_what_the_prompt_gave():
    model = small_model()
    x, t, prompt = torch.randn(1, 2, 3, 4, 4), torch.full((1, 2), 500.0), torch.randn(1, 5, 7)
    first = run(model, x, t, prompt, 0)
    again = run(model, x, t, prompt, 0, cross=(first[3], first[4]))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[3][0], again[3][0])


@given(frames=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), start=st.integers(0, 1000))
def test_rope_tables_of_a_block_are_a_slice_of_the_video(frames, rows, columns, start):
    cos, sin = rope_tables(12, frames, rows, columns, start)
    assert cos.shape == (frames * rows * columns, 6)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    longer, _ = rope_tables(12, frames + 2, rows, columns, start - 1 if start else 0)
    skip = rows * columns if start else 0
    assert torch.equal(longer[skip : skip + len(cos)], cos)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(64, 1e-6).bfloat16()
    x = (torch.randn(2, 64) * 1e3).bfloat16()
    exact = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), exact)


def test_unpatchify_undoes_the_patch_order():
    model = small_model()
    x = torch.randn(2, 2, 3, 4, 6)
    patches = x.unfold(3, 2, 2).unfold(4, 2, 2)  # [B, F, C, rows, columns, 2, 2]
    patches = patches.permute(0, 1, 3, 4, 5, 6, 2).reshape(2, 2 * 2 * 3, 12)
    assert torch.equal(model.unpatchify(patches, 2, 4, 6), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "dim 36 must split into 7 heads"),
        ({"num_heads": 12}, "heads of even size"),
        ({"patch_size": (2, 2, 2)}, "one frame per token"),
    ],
)
def test_inconsistent_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalWanConfig(**{"dim": 36, "num_heads": 3, **changes})


def test_patch_size_may_come_from_json():
    assert CausalWanConfig(patch_size=[1, 2, 2]) == CausalWanConfig()
