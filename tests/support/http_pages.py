"""A pool of `http.server` with pages for the tests, and its client."""

import http.client
import http.server
import ssl
from contextlib import ExitStack
from typing import Any

from . import Program, dial
from .scripts import Start, launch

SERVER = """
import http.server
from prefork import BufferedHTTPMixIn, PreforkHTTPServer

class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        order = self.path[1:].replace("_", " ")
        if order == "nodelay":
            text = str(self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        elif order == "endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"to the end")
            return
        elif order == "stream":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"begun")
            self.wfile.flush()
            pass_gate("go")
            text = None
        elif order == "leaving":
            note("begun")
            while not self.server.worker.draining:
                select.select([], [], [], 0.005)
            text = "done"
        elif order == "child":
            self.send_response(200)
            self.flush_headers()
            self.wfile.flush()
            line = "printf 'Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n'; cat"
            subprocess.run(["/bin/sh", "-c", line], stdin=self.rfile, stdout=self.wfile, check=True)
            return
        else:
            text = perform(order)
        if text is not None:
            self.reply(f"{os.getpid()} {text}".encode())

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        size = int(self.headers["Content-Length"] or 0)
        self.reply(b"ignored" if self.path == "/ignore" else self.rfile.read(size))

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

class Kept(BufferedHTTPMixIn, Pages):
    CLASS

class Server(PreforkHTTPServer):
    workers = 1
    keepalive_timeout = 30
    SETTINGS

if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Kept) as server:
        server.serve_forever()
"""


def serve(start: Start, handler: str = "pass", allow: tuple[str, ...] = (), **settings: object) -> Program:
    text = "; ".join(f"{name} = {value!r}" for name, value in settings.items())
    return launch(start, SERVER.replace("CLASS", handler).replace("SETTINGS", text), allow=allow).ready()


class Client:
    """One connection, of which every byte is told to the reply it belongs to."""

    def __init__(self, program: Program, stack: ExitStack, tls: ssl.SSLContext | None = None) -> None:
        self.sock = stack.enter_context(dial(program.address, 10.0))
        if tls:
            self.sock = stack.enter_context(tls.wrap_socket(self.sock, server_hostname="127.0.0.1"))
        self.file = stack.enter_context(self.sock.makefile("rb"))

    def send(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} /{path} HTTP/1.1", "Host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        if method == "POST" and not headers.keys() & {"Transfer_Encoding", "Content_Length"}:
            lines.append(f"Content-Length: {len(body)}")
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def hear(self, head: bool = False) -> tuple[int, Any, bytes]:
        """Status, headers and body of the next reply."""
        line = self.file.readline()
        if not line:
            raise EOFError
        headers = http.client.parse_headers(self.file)
        length = headers["Content-Length"]
        body = b"" if head else self.file.read(None if length is None else int(length))
        return int(line.split()[1]), headers, body

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> str:
        """Ask for something that must succeed; the reply's text behind the pid."""
        self.send(path, method, body, **headers)
        status, _, text = self.hear()
        assert status == 200
        return text.decode().partition(" ")[2] or text.decode()

    def ended(self) -> bool:
        """Whether nothing but the end comes now."""
        return self.file.read() == b""
