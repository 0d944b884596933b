"""`python -m llava.cli`, as torchrun starts it."""

from llava.cli import main

if __name__ == "__main__":
    main()
