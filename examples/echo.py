"""Echo over TCP, in ten lines.

Run `python examples/echo.py`, then `printf hello | nc -N 127.0.0.1 9000`.
"""

import sys

from prefork import BaseRequestHandler, PreforkTCPServer


class Echo(BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.recv(65536))


class EchoServer(PreforkTCPServer):
    workers = 4


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
    with EchoServer(("127.0.0.1", port), Echo) as server:
        server.serve_forever()
