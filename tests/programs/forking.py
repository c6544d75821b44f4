"""The standard library's ForkingTCPServer, stopped as its users stop it: it shows what the harness sees."""

import argparse
import logging
import signal
import socketserver
import threading
import warnings
from types import FrameType

from work import Work

warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12 it forks beside a thread, and says so

parser = argparse.ArgumentParser()
parser.add_argument("--no-wait", action="store_true", help="leave children behind")
parser.add_argument("--backlog", type=int, default=128)


class Server(socketserver.ForkingTCPServer):
    allow_reuse_address = True


def main() -> None:
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")
    log = logging.getLogger("prefork")
    Server.block_on_close = not arguments.no_wait
    Server.request_queue_size = arguments.backlog
    with Server(("127.0.0.1", 0), Work) as server:

        def leave(number: int, frame: FrameType | None) -> None:
            # A handler that raises is lost where it interrupts a fork's own callbacks, and TERM with it.
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, leave)
        log.info("listening on tcp://127.0.0.1:%d", server.server_address[1])
        log.info("pool ready: 1 worker, generation 1, 0.0 s")
        server.serve_forever()


if __name__ == "__main__":
    main()
