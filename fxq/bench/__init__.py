"""What runs how fast: interleaved, checked measurements against eager, compiled and other libraries.

Nothing here is used by the line: it calls the library as others do.
"""
