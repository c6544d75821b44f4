"""A pool as a library user writes it; each flag is a setting, an address, or trouble to come.

$PREFORK_BOOTS: a file: each worker appends `PID SLOT TIME` in its setup. $PREFORK_TROUBLE: a file that says what
goes wrong in a worker that boots while it exists: `raise`, `hang`, `spin`, `exit` (in `setup`), `run` (once ready).
$PREFORK_NOTES: a file for `finally` and `atexit`.
"""

import argparse
import atexit
import logging
import os
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefork
from work import DatagramWork, Work, note, perform

SETTINGS: dict[str, Callable[[str], Any]] = {
    "workers": int,
    "request_timeout": float,
    "boot_timeout": float,
    "graceful_timeout": float,
    "max_requests": int,
    "max_requests_jitter": int,
    "max_memory": int,
    "max_lifetime": float,
    "max_surge": int,
    "block_on_close": lambda text: text != "no",
    "request_queue_size": int,
    "worker_class": str,
    "threads": int,
    "control": str,
}
SERVERS: dict[str, tuple[Any, type[socketserver.BaseRequestHandler]]] = {
    "tcp": (prefork.PreforkTCPServer, Work),
    "udp": (prefork.PreforkUDPServer, DatagramWork),
    "unix": (prefork.PreforkUnixStreamServer, Work),
    "unixgram": (prefork.PreforkUnixDatagramServer, DatagramWork),
}


def trouble() -> str:
    path = os.environ.get("PREFORK_TROUBLE", "")
    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else ""
    except FileNotFoundError:
        return ""


class TroubledWorker(prefork.SyncWorker):
    """The shipped worker, with a log of its boots, and trouble when it is ordered."""

    def setup(self) -> None:
        super().setup()
        note("PREFORK_BOOTS", f"{os.getpid()} {self.slot} {time.monotonic()}")
        match trouble():
            case "raise":
                raise RuntimeError("ordered trouble")
            case "hang":
                time.sleep(3600)
            case "spin":
                perform("spin", "")
            case "exit":
                os._exit(3)

    def run(self) -> None:
        if trouble() == "run":
            raise RuntimeError("ordered trouble")
        super().run()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("listen", help="tcp://HOST:PORT, udp://HOST:PORT, unix:PATH, unixgram:PATH")
    parser.add_argument("--off-main", action="store_true", help="serve in a second thread; a line on stdin stops")
    parser.add_argument(
        "--host-children", type=int, default=0, help="run this many children of the host, over and over"
    )
    parser.add_argument("--log", help="a file for the log instead of stderr")
    for name, kind in SETTINGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    return parser.parse_args()


def address(text: str) -> tuple[str, Any]:
    kind, _, rest = text.partition(":")
    if kind in ("unix", "unixgram"):
        return kind, rest
    host, _, port = rest.removeprefix("//").rpartition(":")
    return kind, (host.strip("[]"), int(port))


def host_children(number: int) -> None:
    """Children of the program itself, which are none of the pool's business; each answer is noted."""
    import subprocess

    for round_ in range(number):
        code = round_ % 200 + 1
        child = subprocess.Popen(["/bin/sh", "-c", f"read line; exit {code}"], stdin=subprocess.PIPE)
        pid = os.spawnv(os.P_NOWAIT, "/bin/sh", ["sh", "-c", f"exit {code}"])
        _, status = os.waitpid(pid, 0)
        child.communicate(b"go\n")
        note("PREFORK_NOTES", f"child {code} {child.returncode} {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    arguments = parse()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s",
        filename=arguments.log,
    )
    atexit.register(lambda: note("PREFORK_NOTES", f"atexit {os.getpid()}"))
    kind, where = address(arguments.listen)
    server_class, handler = SERVERS[kind]
    settings = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    if "PREFORK_BOOTS" in os.environ or "PREFORK_TROUBLE" in os.environ:
        settings["worker_class"] = TroubledWorker
    attributes: dict[str, Any] = dict(settings)
    if kind == "tcp" and ":" in where[0]:
        attributes["address_family"] = prefork_ipv6()
    pool: Any = type("Pool", (server_class,), attributes)
    note("PREFORK_NOTES", f"begin {os.getpid()}")
    try:
        with pool(where, handler) as server:
            if arguments.host_children:
                threading.Thread(target=host_children, args=(arguments.host_children,), daemon=True).start()
            if arguments.off_main:
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                sys.stdin.readline()
                server.shutdown()
                thread.join()
            else:
                server.serve_forever()
    finally:
        note("PREFORK_NOTES", f"finally {os.getpid()}")


def prefork_ipv6() -> int:
    import socket

    return socket.AF_INET6


if __name__ == "__main__":
    main()
