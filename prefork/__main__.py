"""`python -m prefork`."""

import sys

from prefork.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
