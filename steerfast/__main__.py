"""`python -m steerfast`: the command line."""

from __future__ import annotations

from steerfast.cli import main

if __name__ == "__main__":
    main(prog_name="steerfast")
