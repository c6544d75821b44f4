"""Reload, resize and stop, step by step. A client sends requests all the time, and no answer is lost.

Run `python examples/signals.py [PORT]` and read: the steps are on standard output, the pool's log on standard error. It
ends by itself. While it runs, `printf x | nc -N 127.0.0.1 9005` is another client.

The pool is in the main thread, because Python handles signals there. The operator and the client are a second thread.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection

from prefork import BaseRequestHandler, PreforkTCPServer


class WhoServes(BaseRequestHandler):
    def handle(self) -> None:
        if self.request.recv(100) == b"take your time":
            time.sleep(0.5)
        self.request.sendall(str(os.getpid()).encode())


class Walk(PreforkTCPServer):
    workers = 2
    graceful_timeout = 5.0


class Operator(threading.Thread):
    """Steers the pool by signals and methods, and is its client."""

    def __init__(self, server: Walk) -> None:
        super().__init__(name="operator")
        self.server = server
        self.answered = 0

    def run(self) -> None:
        try:
            self.walk()
        except OSError as error:
            say(f"the pool was stopped from outside ({error.strerror or error})")

    def walk(self) -> None:
        pids = self.settle(2)
        say(f"two workers answer: {spell(pids)}")

        send(signal.SIGTTIN)
        pids = self.settle(3)
        say(f"TTIN, one worker more: {spell(pids)}")

        self.server.scale(5)
        pids = self.settle(5)
        say(f"scale(5), the method: {spell(pids)}")

        send(signal.SIGTTOU)
        pids = self.settle(4)
        say(f"TTOU, one worker fewer: {spell(pids)}")

        send(signal.SIGHUP)
        pids = self.settle(4, without=pids)
        say(f"HUP, a reload: every worker is a new one: {spell(pids)}")

        self.server.reload()
        pids = self.settle(4, without=pids)
        say(f"reload(), the method: {spell(pids)}")

        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        while victim in self.server.active_children:  # until it is dead, it could take a request with it
            time.sleep(0.001)
        pids = self.settle(4, without=[victim])
        say(f"kill -9 of {victim}, as in an accident: it was replaced: {spell(pids)}")

        with self.dial() as slow:
            slow.sendall(b"take your time")
            send(signal.SIGTERM)
            say(f"TERM, a graceful stop: the request in hand was answered, by {self.hear(slow)}")
        say(f"{self.answered} requests, {self.answered} answers")

    def settle(self, size: int, without: Collection[int] = ()) -> set[int]:
        """Ask until the pool has `size` workers, none of them in `without`, and each of them has answered."""
        seen: set[int] = set()
        while True:
            with self.dial() as client:
                client.sendall(b"who serves?")
                seen.add(self.hear(client))
            pids = self.server.active_children
            if len(pids) == size and pids <= seen and pids.isdisjoint(without):
                return pids

    def dial(self) -> socket.socket:
        return socket.create_connection(self.server.server_address, timeout=10.0)

    def hear(self, client: socket.socket) -> int:
        answer = client.recv(100)
        if not answer:
            raise ConnectionError("a request without an answer")
        self.answered += 1
        return int(answer)


def send(number: signal.Signals) -> None:
    """As `kill -NUMBER PID` from a shell."""
    os.kill(os.getpid(), number)


def say(text: str) -> None:
    print(text, flush=True)


def spell(pids: Collection[int]) -> str:
    return " ".join(map(str, sorted(pids)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9005
    with Walk(("127.0.0.1", port), WhoServes) as server:
        operator = Operator(server)
        operator.start()
        server.serve_forever()
    operator.join()
