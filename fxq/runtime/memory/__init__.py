"""Memory of a process: pages of mapped files, what the allocator keeps, weights that lie elsewhere.

Nothing here knows what a job will need; that is planned above.
"""
