r"""A worker class of your own: each worker has its own connection to one SQLite database.

Run `python examples/custom_worker.py [PORT]`, then one of

    echo Ada | nc -N 127.0.0.1 9004
    python -c "import socket; c = socket.create_connection(('127.0.0.1', 9004)); c.send(b'Ada\n'); print(c.recv(99))"

A connection that was opened before the fork would be shared by all workers, which SQLite forbids. `setup()` runs in
each new worker before it serves, `teardown()` after its last request. The database lasts as long as the server.
"""

import logging
import os
import sqlite3
import sys
import tempfile
from contextlib import closing

from prefork import PreforkTCPServer, StreamRequestHandler, SyncWorker

log = logging.getLogger("visits")


class VisitsWorker(SyncWorker):
    server: "VisitsServer"

    def setup(self) -> None:
        # What the worker puts on the server, its handlers find there: the server is this worker's own copy.
        self.server.connection = sqlite3.connect(self.server.database, timeout=10.0, isolation_level=None)
        self.server.slot = self.slot
        log.info("worker %d: opened", self.slot)

    def teardown(self) -> None:
        self.server.connection.close()
        log.info("worker %d: closed", self.slot)


class VisitsServer(PreforkTCPServer):
    worker_class = VisitsWorker
    workers = 4
    database: str
    connection: sqlite3.Connection
    slot: int


class Visits(StreamRequestHandler):
    timeout = 5.0
    server: VisitsServer

    def handle(self) -> None:
        name = self.rfile.readline(64).decode(errors="replace").strip()
        rows = self.server.connection.execute(
            "INSERT INTO visits VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET number = number + 1 RETURNING number",
            (name,),
        ).fetchall()
        self.wfile.write(f"{name}: visit {rows[0][0]}, counted by worker {self.server.slot}\n".encode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9004
    with tempfile.TemporaryDirectory() as directory, VisitsServer(("127.0.0.1", port), Visits) as server:
        server.database = os.path.join(directory, "visits.sqlite3")
        with closing(sqlite3.connect(server.database)) as connection:
            connection.execute("CREATE TABLE visits (name TEXT PRIMARY KEY, number INTEGER)")
        server.serve_forever()
