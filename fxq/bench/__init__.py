"""What runs how fast: interleaved, checked measurements against eager, compiled and other libraries."""
