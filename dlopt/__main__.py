"""Entry point of `python -m dlopt`."""

from dlopt.cli import main

if __name__ == "__main__":
    main()
