"""The shipped worker for any `socketserver` server: one request at a time, the accept loop of the process."""

import socket
import socketserver
from collections.abc import Callable
from time import monotonic
from typing import Any

import prefork.link.scoreboard as scoreboard
import prefork.workers.intake.dispatch as dispatch
from prefork.kernel.unpatched import refuse_patched
from prefork.workers.intake.accept_calls import Take, has_plain_peers
from prefork.workers.worker import Worker


class SyncWorker(Worker):
    """Serves any `socketserver` server, the whole chain of its methods, one request at a time.

    Where the chain hands requests to other threads (`ThreadingMixIn`, an executor), a worker that leaves waits for all
    of them, daemon threads too.
    """

    @classmethod
    def check(cls, server: Any) -> None:
        super().check(server)
        if dispatch.hands_over(server):
            refuse_patched(("threading",), f"{type(server).__name__}.process_request()", "leave ThreadingMixIn out")

    def run(self) -> None:
        acceptor = self.acceptor
        more = True
        if len(self.servers) == 1 and self._handed is None:
            more = self._serve_fast(self.server, *acceptor.takes)
        while more and (taken := self.accept()) is not None:
            self.serve_request(*taken)
        self.finish()

    def _serve_fast(self, server: socketserver.BaseServer, take: Take) -> bool:
        """The hot path: the loop itself accounts for its one request. By an `ActiveRequest` a connection with a short
        request costs 7 to 14 % more CPU. Everything that the loop needs is a local name; each line here was measured.

        It ends when there is nothing more to take (False), or when a store finds that the cells are not its own any
        more (True).
        """
        shutdown = server.shutdown_request
        process = _cheapest_chain(server)
        requests = self._requests
        ints, floats = requests.enter_fast_path()
        since, due, count_at, spent = (
            scoreboard.BUSY_SINCE,
            scoreboard.DEADLINE,
            scoreboard.REQUESTS,
            scoreboard.BUSY_TIME,
        )
        port_at = scoreboard.PEER_PORT
        inet = has_plain_peers(server)
        over, timeout, limit = self.acceptor.over, self._timeout, self._first_check
        count, total, last_host = 0, 0.0, ""
        try:  # around the loop: a `try` within it has the interpreter jump over its `except` at each turn
            while True:
                try:
                    request, peer = take()
                except OSError as error:
                    if over(error):
                        return False
                    continue
                start = monotonic()
                if inet:
                    # A client's host seldom changes from one request to the next; its port always does.
                    if peer[0] != last_host:
                        last_host = peer[0]
                        self._board.set_peer(peer)
                    ints[port_at] = peer[1]
                else:
                    self._board.set_peer(peer)
                # From here to the handler nothing is called: what is found in progress afterwards has been handled.
                floats[since] = start
                if timeout:
                    floats[due] = start + timeout
                try:
                    process(request, peer)
                except Exception:
                    dispatch.failed(server, request, peer)
                except BaseException:
                    shutdown(request)
                    raise
                if timeout:
                    floats[due] = 0.0  # from here on no RequestTimeout can come
                end = monotonic()
                count += 1
                total += end - start
                ints[count_at] = count
                floats[spent] = total
                floats[since] = 0.0
                if count >= limit:
                    self._recycling.check(count, end)
        except ValueError as error:
            trace = error.__traceback__
            if requests.fast_path_cells is not None or (trace is not None and trace.tb_next is not None):
                raise  # of what is called here, no store
        if requests.fast_path_request.thread:
            requests.fast_path_request.end()
        else:
            requests.show_again()  # not the client of this request, which was stored already
            self.serve_request(server, request, peer)
        return True


_CHAIN = {
    "process_request": socketserver.BaseServer.process_request,
    "finish_request": socketserver.BaseServer.finish_request,
}
_STREAM = _CHAIN | {
    "shutdown_request": socketserver.TCPServer.shutdown_request,
    "close_request": socketserver.TCPServer.close_request,
}
_DATAGRAM = _CHAIN | {
    "shutdown_request": socketserver.UDPServer.shutdown_request,
    "close_request": socketserver.UDPServer.close_request,
}


def _cheapest_chain(server: Any) -> Callable[[Any, Any], object]:
    """The cheapest call that does what `verify_request()` and `process_request()` of the server do."""
    process = _cheapest_process(server)
    verify = dispatch.verifier(server)
    if verify is None:
        return process

    def verify_and_process(request: Any, peer: Any) -> None:
        if verify(request, peer):
            process(request, peer)
        else:
            server.shutdown_request(request)

    return verify_and_process


def _cheapest_process(server: Any) -> Callable[[Any, Any], object]:
    """The same for `process_request()` alone. In the stock chain a connection passes through four methods, which is 2 %
    of its cost, and a datagram through four that do nothing."""
    if dispatch.is_stock(server, _DATAGRAM):
        return lambda request, peer: server.RequestHandlerClass(request, peer, server)
    if not dispatch.is_stock(server, _STREAM):
        process: Callable[[Any, Any], object] = server.process_request
        return process
    end_of_stream = socket.SHUT_WR

    def handle_and_close(request: Any, peer: Any) -> None:
        server.RequestHandlerClass(request, peer, server)
        try:  # noqa: SIM105  a context manager is dearer than the call
            request.shutdown(end_of_stream)
        except OSError:
            pass
        request.close()

    return handle_and_close
