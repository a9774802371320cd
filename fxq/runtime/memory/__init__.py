"""Memory of a process: pages of mapped files, what the allocator keeps, weights that lie elsewhere.

What a job needs in all is planned above, not here.
"""
