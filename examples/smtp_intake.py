"""Receive mail: aiosmtpd's protocol in a worker class with an asyncio loop. Mail goes into a Maildir.

Run `python examples/smtp_intake.py [PORT [DIRECTORY]]`, then

    swaks --server 127.0.0.1 --port 9013 --from ada@example.test --to bob@example.test

and find the mail in `mail/new`. A mail that was answered with 250 is on the disk. A worker that leaves accepts the
mails that are being sent. It answers the other clients with 421, "try again": their mail stays in their queue (RFC
5321, 3.8).
"""

import asyncio
import contextlib
import logging
import mailbox
import os
import sys
from typing import Any

from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP, Envelope, Session

from prefork import PreforkTCPServer, Worker


class Dialogue(SMTP):
    """aiosmtpd's protocol, one a connection; `over` is done when the connection has ended."""

    def __init__(self, worker: "MailWorker") -> None:
        super().__init__(worker.handler, hostname="mail.example.test", data_size_limit=10 << 20, timeout=30.0)
        self.worker = worker
        self.over = asyncio.get_running_loop().create_future()
        self.told = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.worker.dialogues.add(self)
        self.leave_soon()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.worker.dialogues.discard(self)
        if not self.over.done():
            self.over.set_result(None)

    async def push(self, status: Any) -> None:
        if not self.told:
            await super().push(status)

    def leave_soon(self) -> None:
        """After the answer that is on its way, if the worker is to leave."""
        if self.worker.draining:
            asyncio.get_running_loop().call_soon(self.leave)

    def leave(self) -> None:
        """Unless there is a mail in hand: say 421, then nothing more, and let the client close."""
        transport = self.transport
        busy = self.envelope is not None and self.envelope.mail_from is not None
        if isinstance(transport, asyncio.WriteTransport) and not (self.told or busy or transport.is_closing()):
            self.told = True
            transport.write(b"421 mail.example.test is about to leave, come back\r\n")
            with contextlib.suppress(OSError):  # the client has already gone
                transport.write_eof()
            self._reset_timeout(2.0)


class Intake(Mailbox):
    """aiosmtpd's handler that writes a Maildir; for the worker each mail is a request."""

    def __init__(self, worker: "MailWorker", directory: str) -> None:
        super().__init__(directory)  # type: ignore[arg-type]
        self.worker = worker

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        try:
            with self.worker.serving(session.peer):
                return await super().handle_DATA(server, session, envelope)
        except OSError as error:
            return f"451 try again later: {error.strerror}"
        finally:
            assert isinstance(server, Dialogue)
            server.leave_soon()


class MailWorker(Worker):
    server: "MailServer"

    def setup(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.left = asyncio.Event()
        self.handler = Intake(self, self.server.directory)
        self.dialogues: set[Dialogue] = set()

    def run(self) -> None:
        self.loop.run_until_complete(self.serve())

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.left.set)  # what a signal handler may do to a loop

    def teardown(self) -> None:
        self.loop.close()

    async def serve(self) -> None:
        (listener,) = self.acceptor.fds
        os.set_blocking(listener, False)
        async with asyncio.TaskGroup() as group:  # ends when the last dialogue has
            self.loop.add_reader(listener, self.take, listener, group)
            await self.left.wait()
            self.loop.remove_reader(listener)
            while self.pool_drains and self.take(listener, group):
                pass  # nobody else will: empty the queue
            for dialogue in list(self.dialogues):
                dialogue.leave()

    def take(self, listener: int, group: asyncio.TaskGroup) -> bool:
        taken = self.acceptor.try_take(listener)
        if taken is not None:
            group.create_task(self.converse(taken[1]))
        return taken is not None

    async def converse(self, client: Any) -> None:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            _, dialogue = await self.loop.connect_accepted_socket(lambda: Dialogue(self), client)
            await dialogue.over


class MailServer(PreforkTCPServer):
    worker_class = MailWorker
    workers = 2
    graceful_timeout = 60.0
    directory: str


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    logging.getLogger("mail.log").setLevel(logging.ERROR)  # aiosmtpd's, which tells every line of every dialogue
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9013
    with MailServer(("127.0.0.1", port), Dialogue) as server:
        server.directory = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else "mail")
        mailbox.Maildir(server.directory)  # made once, here: workers that boot together would be in each other's way
        server.serve_forever()
