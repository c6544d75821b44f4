"""Upper case over UDP: each datagram is a request, and its answer is one datagram.

Run `python examples/upper_udp.py [PORT]`, then one of

    printf hello | nc -u -w 1 127.0.0.1 9001
    python -c "from socket import *; c = socket(type=SOCK_DGRAM); c.sendto(b'a', ('127.0.0.1', 9001)); print(c.recv(9))"
"""

import sys

from prefork import DatagramRequestHandler, PreforkUDPServer


class Upper(DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())  # sent when the handler returns


class UpperServer(PreforkUDPServer):
    workers = 2
    max_packet_size = 65535  # socketserver's own 8192 cuts longer datagrams off


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9001
    with UpperServer(("127.0.0.1", port), Upper) as server:
        server.serve_forever()
