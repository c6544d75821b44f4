r"""A worker class with another loop: gevent's StreamServer, one greenlet per connection.

Run `python examples/gevent_worker.py [PORT]`, then one of

    echo hello | nc -N 127.0.0.1 9014
    python -c "import socket; c = socket.create_connection(('127.0.0.1', 9014)); c.send(b'hello\n'); print(c.recv(99))"

The handler is an ordinary one of socketserver. A thousand idle clients occupy one process, not a thousand.
docs/howto/write-a-worker-class.md explains this worker line by line.
"""

import sys
from typing import Any

# Importing changes nothing; it is done before the fork, once for all workers.
from gevent import Timeout, event, monkey, pool  # type: ignore[import-untyped]
from gevent.server import StreamServer  # type: ignore[import-untyped]

from prefork import PreforkTCPServer, RequestTimeout, StreamRequestHandler, Worker


class GeventWorker(Worker):
    """Serves TCP and Unix streams, each connection in a greenlet; `max_connections` at once."""

    server: PreforkTCPServer

    def setup(self) -> None:
        monkey.patch_all()  # only here, in the child: the master must keep its own select, threads and signals
        self.told = event.Event()
        self.greenlets = pool.Pool(self.options.max_connections)
        self.server.socket.setblocking(False)
        self.stream = StreamServer(self.server.socket, self.serve, spawn=self.greenlets)

    def run(self) -> None:
        self.stream.start()
        self.told.wait()
        self.stream.stop_accepting()
        while self.pool_drains and (taken := self.stream.do_read()):
            self.stream.do_handle(*taken)  # nobody else will take what is queued
        self.greenlets.join()

    def drain(self) -> None:
        self.told.set()

    def serve(self, client: Any, peer: Any) -> None:
        limit = self.options.request_timeout
        # gevent ends a late greenlet that waits. A second later the master finds a loop that does not turn.
        with self.serving(peer, limit and limit + 1.0):
            try:
                with Timeout(limit, RequestTimeout(f"the request took longer than {limit} s")):
                    self.server.finish_request(client, peer)
            except Exception:
                self.server.handle_error(client, peer)
            finally:
                self.server.shutdown_request(client)


class Echo(StreamRequestHandler):
    timeout = 60.0  # seconds of silence

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class EchoServer(PreforkTCPServer):
    worker_class = GeventWorker
    workers = 2


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9014
    with EchoServer(("127.0.0.1", port), Echo) as server:
        server.serve_forever()
