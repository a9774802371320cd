"""A second, plain implementation of the official rollout: one cache of fixed size per layer, written in place.

It shares weights with fxq's model and nothing of its sampler, cache policy, RoPE or schedule. ``dump`` writes
a file of the form that tests/models/golden.py reads.
"""

import json

import torch
from safetensors.torch import save_file


class Cache:
    """Keys and values [B, size, heads, head_dim]; ``local_end`` slots hold tokens up to absolute ``global_end``."""

    def __init__(self, batch, size, heads, head_dim, dtype):
        self.k = torch.full((batch, size, heads, head_dim), torch.nan, dtype=dtype)
        self.v = self.k.clone()
        self.global_end = self.local_end = 0

    def write(self, k, v, current_start, sink, attention_size, windowed):
        size, new = self.k.shape[1], k.shape[1]
        current_end = current_start + new
        end = self.local_end + current_end - self.global_end
        overflow = new + self.local_end - size
        if windowed and current_end > self.global_end and overflow > 0:
            moved = max(self.local_end - overflow - sink, 0)
            for tensor in (self.k, self.v):
                tensor[:, sink : sink + moved] = tensor[:, sink + overflow : sink + overflow + moved].clone()
            end -= overflow
        self.k[:, end - new : end] = k
        self.v[:, end - new : end] = v
        self.global_end, self.local_end = current_end, end
        visible = slice(max(0, end - attention_size), end)
        return self.k[:, visible], self.v[:, visible]


def rotate(x, frames, rows, columns, start_frame):
    """Rotary embedding as a product of complex numbers, position by position."""
    half = x.shape[-1] // 2
    spatial = half // 3
    exponents = (half - 2 * spatial, spatial, spatial)
    angles = torch.zeros(frames, rows, columns, half, dtype=torch.float64)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                parts = [
                    position / 10000.0 ** (torch.arange(n, dtype=torch.float64) / n)
                    for position, n in zip((start_frame + f, r, c), exponents, strict=True)
                ]
                angles[f, r, c] = torch.cat(parts)
    turn = torch.polar(torch.ones_like(angles), angles).reshape(1, -1, 1, half)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2))
    return torch.view_as_real(pairs * turn).flatten(3).to(x.dtype)


def attend(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


class Denoiser:
    def __init__(self, model, batch, rows, columns, window, sink, total_frames):
        self.model, self.rows, self.columns = model, rows, columns
        config, self.tokens = model.config, rows * columns
        dtype = model.patch_embedding.weight.dtype
        self.windowed = window != -1
        self.size = (window if self.windowed else total_frames) * self.tokens
        self.sink = sink * self.tokens
        self.caches = [
            Cache(batch, self.size, config.num_heads, config.head_dim, dtype) for _ in range(config.num_layers)
        ]
        self.cross = [None] * config.num_layers

    def __call__(self, x, t, prompt, current_start):
        model, frames = self.model, x.shape[1]
        if t.shape[1] == 1:
            t = t.expand(-1, frames)
        e, e0 = model.embed_time(t)
        padded = torch.zeros(prompt.shape[0], model.config.text_len, prompt.shape[2], dtype=prompt.dtype)
        padded[:, : prompt.shape[1]] = prompt
        text = model.text_embedding(padded)
        h = model.patchify(x)
        for layer, block in enumerate(model.blocks):
            if self.cross[layer] is None:
                self.cross[layer] = block.cross_attn.kv(text)

            def self_attend(attn, hidden, cache=self.caches[layer]):
                heads = attn.num_heads
                q, k = (norm(lin(hidden)) for norm, lin in ((attn.norm_q, attn.q), (attn.norm_k, attn.k)))
                v = attn.v(hidden).unflatten(-1, (heads, -1))
                where = (frames, self.rows, self.columns, current_start // self.tokens)
                q, k = (rotate(z.unflatten(-1, (heads, -1)), *where) for z in (q, k))
                return attn.o(attend(q, *cache.write(k, v, current_start, self.sink, self.size, self.windowed)))

            h = block(h, e0, *self.cross[layer], self_attend)
        return model.unpatchify(model.head(h, e), frames, x.shape[3], x.shape[4])


def dump(path, model, *, args, seed=0):
    """Run the official loop with settings ``args`` (names as in the official toy's metadata) and write a dump."""
    generator = torch.Generator().manual_seed(seed)
    dtype, config = model.patch_embedding.weight.dtype, model.config
    batch, size = args["batch"], args["frames_per_chunk"]
    height, width = args["height"], args["width"]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    noise = normal(batch, args["chunks"] * size, config.in_dim, height, width)
    initial = normal(batch, args["initial_chunks"] * size, config.in_dim, height, width)
    prompt = normal(batch, args["text_tokens"], config.text_dim)

    u = torch.linspace(1, 0, 1001)[:-1]
    sigmas = args["shift"] * u / (1 + (args["shift"] - 1) * u)
    timesteps = sigmas * 1000

    def real(steps):
        steps = torch.tensor(steps)
        return steps if args["no_warp"] else torch.cat((timesteps, torch.zeros(1)))[1000 - steps]

    def sigma_of(t):
        nearest = (timesteps.double()[None] - t.double().flatten()[:, None]).abs().argmin(1)
        return sigmas[nearest].reshape(*t.shape, 1, 1, 1)

    _, rows_per_token, columns_per_token = config.patch_size
    rows, columns = height // rows_per_token, width // columns_per_token
    total = noise.shape[1] + initial.shape[1]
    denoiser = Denoiser(model, batch, rows, columns, args["local_attn_size"], args["sink_size"], total)
    tensors, calls, draws = {}, [], []
    steps = real(args["steps"])
    first_steps = steps if args["first_chunk_steps"] is None else real(args["first_chunk_steps"])

    def call(x, t, chunk, step, kind, start_frame):
        flow = denoiser(x, t, prompt, start_frame * rows * columns)
        x0 = (x.double() - sigma_of(t).double() * flow.double()).to(dtype)
        name, cache = f"call.{len(calls):03d}", denoiser.caches[0]
        tensors.update({f"{name}.x": x, f"{name}.t": t, f"{name}.flow": flow, f"{name}.x0": x0})
        calls.append(
            {
                "chunk": chunk,
                "step": step,
                "kind": kind,
                "current_start": start_frame * rows * columns,
                "frames": x.shape[1],
                "global_end": cache.global_end,
                "local_end": cache.local_end,
            }
        )
        return x0

    def keep_caches(chunk):
        for layer, cache in enumerate(denoiser.caches):
            tensors[f"cache.{chunk:02d}.{layer:02d}.k"] = cache.k[:, : cache.local_end].clone()
            tensors[f"cache.{chunk:02d}.{layer:02d}.v"] = cache.v[:, : cache.local_end].clone()

    output, start, chunk = [], 0, 0
    for _ in range(args["initial_chunks"]):
        x = initial[:, start : start + size].contiguous()
        call(x, torch.zeros(batch, 1), chunk, 0, "initial", start)
        output.append(x)
        keep_caches(chunk)
        start, chunk = start + size, chunk + 1
    for index in range(args["chunks"]):
        x = noise[:, index * size : (index + 1) * size].contiguous()
        chunk_steps = first_steps if index == 0 else steps
        for step, timestep in enumerate(chunk_steps):
            x0 = call(x, torch.ones(batch, size, dtype=torch.int64) * timestep, chunk, step, "denoise", start)
            if step + 1 < len(chunk_steps):
                fresh = normal(batch * size, config.in_dim, height, width)
                draws.append(fresh)
                sigma = sigma_of(torch.full((batch * size,), float(chunk_steps[step + 1])))
                x = ((1 - sigma) * x0.flatten(0, 1) + sigma * fresh).to(dtype).unflatten(0, (batch, size))
        call(x0, torch.full((batch, size), float(args["context_noise"])), chunk, len(chunk_steps), "context", start)
        output.append(x0)
        keep_caches(chunk)
        start, chunk = start + size, chunk + 1

    tensors |= {f"renoise.{i:03d}.noise": d for i, d in enumerate(draws)}
    tensors |= {f"generator.model.{k}": v for k, v in model.state_dict().items()}
    for layer, (k, v) in enumerate(denoiser.cross):
        tensors |= {f"cross.{layer:02d}.k": k, f"cross.{layer:02d}.v": v}
    tensors |= {"schedule.sigmas": sigmas, "schedule.timesteps": timesteps, "schedule.steps": steps.float()}
    tensors |= {"in.noise": noise, "in.prompt_embeds": prompt, "out.latents": torch.cat(output, dim=1)}
    if args["initial_chunks"]:
        tensors["in.initial_latent"] = initial
    shape = {name: getattr(config, name) for name in config.__dataclass_fields__}
    metadata = {"args": json.dumps(args), "config": json.dumps(shape), "calls": json.dumps(calls)}
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata=metadata)
