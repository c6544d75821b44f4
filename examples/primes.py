r"""Count primes on every processor: each request keeps a processor busy. `make serve` starts it.

Run `python examples/primes.py [PORT]`, then one of

    echo 100000 | nc -N 127.0.0.1 9999
    python -c "import socket; c = socket.create_connection(('127.0.0.1', 9999)); c.send(b'100000\n'); print(c.recv(99))"

A request is one line, a whole number N. The answer says how many primes are below N, and which worker counted. The
command serves the same handler: in `examples/`, `prefork primes:Primes -b tcp://127.0.0.1:9999 -w 4`.
"""

import contextlib
import logging
import math
import os
import sys

from prefork import PreforkTCPServer, RequestTimeout, StreamRequestHandler


def primes_below(limit: int) -> int:
    """Count by trial division, from the start for every request: what is shown here is work, not a clever sieve."""
    count = int(limit > 2)
    for number in range(3, limit, 2):
        for divisor in range(3, math.isqrt(number) + 1, 2):
            if number % divisor == 0:
                break
        else:
            count += 1
    return count


class Primes(StreamRequestHandler):
    timeout = 5.0  # seconds for a client to send its line: meanwhile the worker is held

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client left, or sends nothing
            self.wfile.write(self.answer(self.rfile.readline(32)).encode())

    def answer(self, line: bytes) -> str:
        try:
            limit = int(line)
            return f"{primes_below(limit)} primes below {limit}, counted by pid {os.getpid()}\n"
        except ValueError:
            return "error: send one whole number\n"
        except RequestTimeout as late:
            return f"error: {late}\n"


class PrimesServer(PreforkTCPServer):
    request_timeout = 10.0  # workers: as many as there are processors


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    with PrimesServer(("127.0.0.1", port), Primes) as server:
        server.serve_forever()
