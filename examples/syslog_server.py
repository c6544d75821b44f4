r"""Syslog over UDP and over a Unix datagram socket, served by one pool, into one file.

Run `python examples/syslog_server.py [PORT [PATH [FILE]]]`, then one of

    logger --server 127.0.0.1 --port 9010 --udp -p mail.warning hello
    logger -u log.sock -t backup -p daemon.err 'the disk is full'

and see `messages.log`. Each worker opens the file in `setup()`, to append. A line is one write, and the kernel does not
mix it with the writes of other workers.
"""

import os
import re
import sys
from datetime import datetime

from prefork import BaseRequestHandler, PreforkUDPServer, PreforkUnixDatagramServer, SyncWorker, serve

SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news"),
    *("uucp", "cron", "authpriv", "ftp", "ntp", "audit", "alert", "clock"),
    *(f"local{n}" for n in range(8)),
)
PRIORITY = re.compile(rb"<(\d{1,3})>(1 )?")  # RFC 3164 section 4.1.1; the version is of RFC 5424


def parse(data: bytes) -> tuple[str, str]:
    """Priority and text of a message. What has no priority is user.notice, as RFC 3164 (4.3.3) wants it."""
    number, start = 13, 0
    if (head := PRIORITY.match(data)) and int(head[1]) < 8 * len(FACILITIES):
        number, start = int(head[1]), head.end()
    text = data[start:].rstrip(b"\0\r\n").decode("utf-8", "backslashreplace")
    # A message stays one line, and moves no cursor.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.removeprefix("\ufeff"))
    return f"{FACILITIES[number >> 3]}.{SEVERITIES[number & 7]}", text


class Message(BaseRequestHandler):
    server: "SyslogUDP | SyslogUnix"

    def handle(self) -> None:
        priority, text = parse(self.request[0])
        sender = self.client_address[0] if isinstance(self.client_address, tuple) else "local"
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        os.write(self.server.book, f"{now} {sender} {priority} {text}\n".encode())


class SyslogWorker(SyncWorker):
    servers: tuple["SyslogUDP", "SyslogUnix"]

    def setup(self) -> None:
        for server in self.servers:
            server.book = os.open(server.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def teardown(self) -> None:
        for server in self.servers:
            os.close(server.book)


class SyslogUDP(PreforkUDPServer):
    worker_class = SyslogWorker
    workers = 2
    max_packet_size = 65535
    file: str
    book: int


class SyslogUnix(PreforkUnixDatagramServer):
    unix_mode = 0o666  # every user may log, as with /dev/log
    max_packet_size = 65535
    file: str
    book: int


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9010
    path = sys.argv[2] if len(sys.argv) > 2 else "log.sock"
    with SyslogUDP(("127.0.0.1", port), Message) as udp, SyslogUnix(path, Message) as local:
        udp.file = local.file = os.path.abspath(sys.argv[3] if len(sys.argv) > 3 else "messages.log")
        serve(udp, local)
