"""Host and port as one text: in names of listeners, in names of clients, and in URLs."""


def bracketed(host: str) -> str:
    """A host as it may stand before a port: the address of IPv6 in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def host_port(host: str, port: int) -> str:
    return f"{bracketed(host)}:{port}"


def of_peer(peer: object) -> str:
    """A client's address, as a socket gives it, in a line of the log."""
    if isinstance(peer, tuple) and len(peer) > 1:
        return host_port(str(peer[0]), peer[1])
    return str(peer) if peer else "a client without a name"
