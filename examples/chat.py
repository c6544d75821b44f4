r"""A chat whose members are on different workers. Workers share no objects: each message goes through Redis.

Start a Redis server and `python examples/chat.py [PORT [URL]]`; the default URL is redis://127.0.0.1:6379. Then, in
several terminals,

    nc 127.0.0.1 9012

Each line goes to all members; `/name Ada` changes your name. Read `setup()`: every worker opens its own connections to
Redis after the fork. A connection that the master had opened would be one socket in all workers, and each would read
the answers of the others.
"""

import contextlib
import itertools
import logging
import socket
import sys
import threading
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import redis

from prefork import PreforkMixIn, StreamRequestHandler, SyncWorker

CHANNEL = "chat"


class ChatWorker(SyncWorker):
    server: "ChatServer"
    feed: Any

    def setup(self) -> None:
        server = self.server
        server.redis = redis.Redis.from_url(server.url, socket_connect_timeout=5.0)
        self.feed = server.redis.pubsub()  # type: ignore[no-untyped-call]
        self.feed.subscribe(CHANNEL)
        if self.feed.get_message(timeout=5.0) is None:  # ready means: what is said from now on is heard
            raise TimeoutError(f"no answer from {server.url}")
        threading.Thread(target=self.listen, name="feed", daemon=True).start()

    def listen(self) -> None:
        """Pass on what any worker's members say."""
        try:
            for message in self.feed.listen():
                if message["type"] == "message":
                    self.server.tell(message["data"])
        except (redis.RedisError, OSError, ValueError):
            if not self.draining:
                self.recycle("Redis went away")  # a new worker that has a connection takes over

    def drain(self) -> None:
        super().drain()
        for member in list(self.server.members):
            hang_up(member)


class Member(StreamRequestHandler):
    server: "ChatServer"
    numbers = itertools.count(1)

    def setup(self) -> None:
        super().setup()
        # Members may be silent for hours. Whoever has lost the network is found by the kernel.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def handle(self) -> None:
        worker = self.server.worker
        assert worker is not None
        name = f"guest-{worker.slot}-{next(self.numbers)}"
        self.server.join(self.connection)  # first: who is welcomed hears everything from then on
        self.wfile.write(f"welcome, {name}, to worker {worker.slot}\n".encode())
        with contextlib.suppress(ConnectionError):
            while line := self.rfile.readline(1000).decode(errors="replace"):
                text = "".join(filter(str.isprintable, line)).strip()
                if text.startswith("/name "):
                    name = text.removeprefix("/name ")[:20]
                elif text:
                    self.say(f"{name}: {text}\n")
            self.wfile.write(b"goodbye, come back\n")

    def say(self, text: str) -> None:
        try:
            self.server.redis.publish(CHANNEL, text.encode())
        except redis.RedisError:
            self.wfile.write(b"not sent: Redis does not answer\n")

    def finish(self) -> None:
        self.server.members.discard(self.connection)
        super().finish()


class ChatServer(PreforkMixIn, ThreadingMixIn, TCPServer):
    worker_class = ChatWorker
    workers = 2
    url: str
    redis: "redis.Redis"
    members: set[socket.socket]  # those of this worker

    def join(self, member: socket.socket) -> None:
        self.members.add(member)
        if self.worker and self.worker.draining:  # asked after the add: `drain()` sees it, or it sees `draining`
            hang_up(member)

    def tell(self, line: bytes) -> None:
        for member in list(self.members):
            try:
                whole = member.send(line, socket.MSG_DONTWAIT) == len(line)
            except OSError:
                whole = False
            if not whole:  # so far behind that its buffer is full, or gone
                with contextlib.suppress(OSError):
                    member.shutdown(socket.SHUT_RDWR)


def hang_up(member: socket.socket) -> None:
    """Have its handler read what has come, and then the end of the stream."""
    with contextlib.suppress(OSError):
        member.shutdown(socket.SHUT_RD)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9012
    with ChatServer(("127.0.0.1", port), Member) as server:
        server.url = sys.argv[2] if len(sys.argv) > 2 else "redis://127.0.0.1:6379"
        server.members = set()
        server.serve_forever()
