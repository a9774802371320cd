"""What published files of causal Wan models look like: names, sizes, settings, families of their own and foreign ones.

Families are data and pure functions of names and tensors. Nothing here opens a file or builds a model.
"""
