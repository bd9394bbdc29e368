"""``python -m qkit``: the same as the command ``qkit``."""

from qkit.commands import main

if __name__ == "__main__":
    main()
