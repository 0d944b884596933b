"""Entry point for LLaVA's documented command `python3 -m llava.model.apply_delta`; see llava/convert/merge.py."""

import sys

from llava.cli import main

if __name__ == "__main__":
    main(["apply-delta", *sys.argv[1:]])
