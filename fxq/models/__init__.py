"""Model families: the denoisers and how they are sampled."""
