"""``python -m proxytune``."""

from __future__ import annotations

from proxytune.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
