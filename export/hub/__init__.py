"""Bundles on the hub of Hugging Face, through its own client: fetched, described, pushed.

Nothing here reads what a bundle says but its manifest; nothing is fetched that could hold code.
"""
