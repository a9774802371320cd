"""What to expect before anything runs: memory and speed from shapes, and what this machine can do."""
