"""Each kind of server, and the program around it that the tests of socketserver's contract run."""

from .scripts import TCP

KINDS = {
    "tcp": ("PreforkTCPServer", "Handler", TCP, ""),
    "tcp6": ("PreforkTCPServer", "Handler", '("::1", 0)', "address_family = socket.AF_INET6"),
    "udp": ("PreforkUDPServer", "Datagrams", TCP, ""),
    "udp6": ("PreforkUDPServer", "Datagrams", '("::1", 0)', "address_family = socket.AF_INET6"),
    "unix": ("PreforkUnixStreamServer", "Handler", 'str(RUN / "s")', ""),
    "unixgram": ("PreforkUnixDatagramServer", "Datagrams", 'str(RUN / "s")', ""),
}


def simple(kind: str = "tcp", extra: str = "", use: str = "server.serve_forever()", workers: int = 2) -> str:
    """A program with one server; `extra` is one more line of its class, `use` what is done with it."""
    base, handler, address, family = KINDS[kind]
    lines = [family, extra, f"workers = {workers}"]
    body = "\n".join(f"    {line}" for part in lines if part for line in part.splitlines())
    uses = "\n".join(f"    {line}" for line in use.splitlines())
    return f"class Server(prefork.{base}):\n{body}\n\nwith Server({address}, {handler}) as server:\n{uses}\n"
