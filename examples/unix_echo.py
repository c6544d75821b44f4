r"""Echo, line by line, over a Unix socket. The file is removed when the server ends; its mode is 0600.

Run `python examples/unix_echo.py [PATH]`, then one of

    echo hello | nc -N -U echo.sock
    python -c "from socket import *; c = socket(AF_UNIX); c.connect('echo.sock'); c.send(b'hello\n'); print(c.recv(99))"
"""

import sys

from prefork import PreforkUnixStreamServer, StreamRequestHandler


class Echo(StreamRequestHandler):
    timeout = 60.0  # a conversation holds its worker; this is how long it may be silent

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class EchoServer(PreforkUnixStreamServer):
    workers = 4


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "echo.sock"
    with EchoServer(path, Echo) as server:
        server.serve_forever()
