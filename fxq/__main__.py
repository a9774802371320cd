"""``python -m fxq`` is the command line."""

from fxq.cli import main

if __name__ == "__main__":
    main()
