"""From text to prompt embeddings and from latents to frames, by the models that people have in local folders.

Nothing here knows a denoiser, and nothing here is downloaded.
"""
