"""How passes recognise and replace what is in a graph: patterns, edits, rotations, channel axes.

Nothing here is a pass: no stage, no order, no remark of its own.
"""
