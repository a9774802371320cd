"""The cache of keys and values of an autoregressive video model: its policy, its codecs, its storage.

Nothing here knows a model family, a graph or a pass.
"""
