"""Where a long job runs: memory and disk, processes, saved progress and its display.

Nothing here knows graphs, layers or quantization.
"""
