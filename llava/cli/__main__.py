"""Entry point for `python -m llava.cli`, used with torchrun."""

from llava.cli import main

if __name__ == "__main__":
    main()
