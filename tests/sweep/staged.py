"""A program that says that it waits, with everything imported, until its standard input can be read; then it begins.

`command ARGUMENTS...` is the command. `script PORT PATH NAME=SECONDS...` is a program with a master of its own, and
settings.
"""

import logging
import select
import sys

import prefork
import prefork.command.cli
from work import Work


def script(port: str, path: str, *settings: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")
    seconds = {name: float(value) for name, _, value in (setting.partition("=") for setting in settings)}
    attributes = {"workers": 3, **seconds}
    tcp = type("TCP", (prefork.PreforkTCPServer,), attributes)
    unix = type("Unix", (prefork.PreforkUnixStreamServer,), attributes)
    with tcp(("127.0.0.1", int(port)), Work) as first, unix(path, Work) as second:
        prefork.serve(first, second)


if __name__ == "__main__":
    print("waits", flush=True)
    select.select([0], [], [])
    if sys.argv[1] == "script":
        script(*sys.argv[2:])
    else:
        sys.exit(prefork.command.cli.main(sys.argv[2:]))
