"""The socket filter of a graceful stop, and the handshakes that had begun before it was attached.

On a TCP listener the filter drops segments that only say SYN. The client's kernel repeats them, and finds the successor
or a closed port. Connections that exist, and handshakes that have begun, are left alone. On a UDP socket the filter
drops everything that arrives from then on.
"""

import array
import contextlib
import socket
import struct
import sys

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_Instruction = tuple[int, int, int, int]  # of classic BPF: code, jumps if true and if false, operand
_ACCEPT: _Instruction = (0x06, 0, 0, 0xFFFFFFFF)
_DROP: _Instruction = (0x06, 0, 0, 0)
_DROP_NEW_CONNECTIONS: list[_Instruction] = [
    (0x30, 0, 0, 13),  # load the byte of flags: data begins at the TCP header, for IPv4 and IPv6
    (0x54, 0, 0, 0x12),  # keep of it SYN and ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    _DROP,
    _ACCEPT,
]
_DROP_ALL = [_DROP]

# sock_diag(7): the kernel's own list of sockets by state. /proc/net/tcp takes 70 ms when there are many.
_SOCK_DIAG = 4
_DIAG_BY_FAMILY = 20
_DUMP = 0x301
_SYN_RECV = 1 << 3


def attach(sock: socket.socket) -> bool:
    """Keep new clients out. False: the system has no such filter, or refuses it."""
    if sys.platform != "linux":
        return False
    program = _DROP_NEW_CONNECTIONS if sock.type == socket.SOCK_STREAM else _DROP_ALL
    code = array.array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    address, _ = code.buffer_info()
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), address))
        return True
    return False


def detach(sock: socket.socket) -> None:
    """Let new clients in again."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def has_half_open(sock: socket.socket) -> bool:
    """Whether a client of a TCP listener is between its SYN and the end of the handshake.

    Such a client may believe already that it is connected.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as netlink:
        netlink.settimeout(0.05)
        head = struct.pack(
            "=IHHII BBBxI", 72, _DIAG_BY_FAMILY, _DUMP, 0, 0, int(sock.family), socket.IPPROTO_TCP, 0, _SYN_RECV
        )
        netlink.send(head + struct.pack("!H46x", sock.getsockname()[1]))
        # One answer per socket, or the end of an empty list.
        return bool(struct.unpack_from("=IH", netlink.recv(65536))[1] == _DIAG_BY_FAMILY)
    return False
