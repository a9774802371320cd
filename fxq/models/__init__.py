"""Model families: the denoisers and how they are sampled.

Nothing here knows a pass, a recipe or a bundle: the library learns nothing about them.
"""
