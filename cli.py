"""Launcher: ``python cli.py ...`` is the same as the installed command ``qkit ...``."""

from __future__ import annotations

from qkit.commands import main

if __name__ == "__main__":
    main()
