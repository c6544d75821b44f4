"""`prefork`, and `python -m prefork`: a command for a running pool, or a pool to be served.

The former is run again and again, and starts in a third of the time: it imports neither the master nor a worker.
"""

import sys

from prefork.command.words import COMMANDS


def main() -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        import prefork.command.steer as steer

        return steer.main(words)
    import prefork.command.cli as cli

    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
