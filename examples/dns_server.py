"""DNS over UDP and TCP: dnslib's own two servers with the mix-in in front, both served by one pool.

Run `python examples/dns_server.py [PORT]`, then one of

    dig @127.0.0.1 -p 9006 www.example.test
    dig @127.0.0.1 -p 9006 +tcp example.test MX
    dig @127.0.0.1 -p 9006 long.example.test TXT

The last answer is too long for a datagram: the server says so, and dig asks again over TCP.
"""

import contextlib
import logging
import socket
import sys
from typing import Any

import dnslib.server  # type: ignore[import-untyped]
from dnslib import QTYPE, RCODE, RR, DNSRecord

from prefork import PreforkMixIn, serve

log = logging.getLogger("dns")

ZONE = f"""
$ORIGIN example.test.
@       3600 IN SOA  ns hostmaster 1 7200 900 1209600 300
@       3600 IN NS   ns
@       3600 IN MX   10 mail
ns       300 IN A    192.0.2.1
mail     300 IN A    192.0.2.25
www      300 IN A    192.0.2.80
www      300 IN AAAA 2001:db8::80
long     300 IN TXT  {" ".join(f'"{n:02} {"x" * 200}"' for n in range(8))}
"""


class Zone:
    """Answers from one zone. Each worker has its own copy, by the fork."""

    def __init__(self, text: str) -> None:
        self.records: dict[str, list[Any]] = {}
        for record in RR.fromZone(text):
            self.records.setdefault(str(record.rname).lower(), []).append(record)

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        reply = request.reply()
        wanted = QTYPE[request.q.qtype]
        known = self.records.get(str(request.q.qname).lower())
        if known is None:
            reply.header.rcode = RCODE.NXDOMAIN
        for record in known or ():
            if wanted in (QTYPE[record.rtype], "ANY"):
                reply.add_answer(record)
        return reply


class Queries(dnslib.server.DNSHandler):  # type: ignore[misc]
    udplen = 512  # bytes; what a client that knows no EDNS can take

    def setup(self) -> None:
        if self.server.socket_type == socket.SOCK_STREAM:
            self.request.settimeout(5.0)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client left, or sends nothing
            super().handle()


class UDPServer(PreforkMixIn, dnslib.server.UDPServer):  # type: ignore[misc]
    workers = 4
    max_packet_size = 4096


class TCPServer(PreforkMixIn, dnslib.server.TCPServer):  # type: ignore[misc]
    """Its settings do not count: those of the first server that is given to `serve()` do."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9006
    with UDPServer(("127.0.0.1", port), Queries) as udp, TCPServer(("127.0.0.1", port), Queries) as tcp:
        for server in (udp, tcp):
            server.resolver = Zone(ZONE)
            server.logger = dnslib.server.DNSLogger("error", prefix=False, logf=log.warning)
        serve(udp, tcp)
