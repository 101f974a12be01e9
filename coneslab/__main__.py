"""`python -m coneslab COMMAND ...`: the command line, where `coneslab` is not on the path."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
