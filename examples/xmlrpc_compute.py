"""Remote procedures over XML-RPC. Each call is a connection of its own, so the calls go to different workers.

Run `python examples/xmlrpc_compute.py [PORT]`, then

    python -c "import xmlrpc.client; print(xmlrpc.client.ServerProxy('http://127.0.0.1:9003').longest(100000))"
"""

import os
import sys
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

from prefork import PreforkMixIn


def longest(limit: object) -> tuple[int, int]:
    """The number below `limit` whose Collatz sequence takes the most steps to reach 1, and how many those are."""
    if not isinstance(limit, int):  # what a client sends can be of any type; it gets this as a fault
        raise TypeError("limit must be an integer")
    best = 1, 0
    for start in range(1, limit):
        number, steps = start, 0
        while number != 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            steps += 1
        if steps > best[1]:
            best = start, steps
    return best


class Requests(SimpleXMLRPCRequestHandler):
    timeout = 5.0  # seconds for a client to send its call


class ComputeServer(PreforkMixIn, SimpleXMLRPCServer):
    request_timeout = 30.0  # the caller of one that takes longer gets a fault that says so


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9003
    with ComputeServer(("127.0.0.1", port), requestHandler=Requests, logRequests=False) as server:
        server.register_introspection_functions()
        server.register_function(longest)
        server.register_function(os.getpid, "pid")
        server.serve_forever()
