"""Where a long job runs: memory and disk, processes, saved progress and what is shown of it.

Nothing here knows graphs, layers or quantization.
"""
