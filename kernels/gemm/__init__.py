"""Integer and float8 linears with one or two input scales: operators, references, Triton, tiles.

Nothing here knows layers or graphs; what several families need lies one folder up.
"""
