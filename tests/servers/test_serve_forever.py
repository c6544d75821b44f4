"""socketserver's contract: `serve_forever`, `shutdown` and `server_close`."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import ask, elapse, patterns, switches, until
from support.contract import KINDS, simple
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_serve_forever_again(start: Start, kind: str) -> None:
    """A server whose loop was stopped serves again, at the same address, three times over."""
    use = "for _ in range(3):\n    server.serve_forever()"
    program = launch(start, simple(kind, use=use)).ready()
    addresses = set()
    for number in (1, 2, 3):
        program.wait_for(patterns.READY, number=number)
        addresses.add(str(program.addresses[-1]))
        ask(program.address)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPED, number=number)
    assert program.wait_exit().code == 0
    assert len(addresses) == 1
    program.finish()


def test_shutdown_from_another_thread(start: Start, notes: Notes) -> None:
    """shutdown() waits until serve_forever() has returned, from several threads at once; after it, it returns at
    once."""
    use = (
        "for number in range(3):\n"
        "    when('stop', server.shutdown)\n"
        "server.serve_forever()\n"
        "note('returned ' + str(sorted(server.active_children)))\n"
        "server.shutdown()\n"
        "note('again')"
    )
    program = launch(start, simple(use=use)).ready()
    ask(program.address)
    program.write("stop", "")
    assert program.wait_exit().code == 0
    assert notes("returned") == ["[]"]
    assert notes("again") == [""]
    program.finish()


def test_shutdown_before_the_loop(start: Start, notes: Notes) -> None:
    """A shutdown() that comes before serve_forever() makes it return at once, and the next one serve."""
    use = (
        "(HOME / 'stop').touch()\n"
        "thread = when('stop', server.shutdown)\n"
        "while not server._pool or not server._pool._stop_requested:\n"
        "    select.select([], [], [], 0.001)\n"
        "server.serve_forever()\n"
        "thread.join()\n"
        "note('returned')\n"
        "server.serve_forever()"
    )
    program = launch(start, simple(use=use)).ready()
    assert notes("returned") == [""]
    assert len(program.found(patterns.READY)) == 1
    ask(program.address)
    program.finish()


def test_off_the_main_thread(start: Start, notes: Notes) -> None:
    """Off the main thread no signal is touched; reload(), scale() and shutdown() steer the pool."""
    program = launch(
        start,
        """
        before = {one: signal.getsignal(one) for one in signal.valid_signals()}

        class Server(prefork.PreforkTCPServer):
            workers = 2

        with Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            when("more", lambda: server.scale(4))
            when("fewer", lambda: server.scale(1))
            when("reload", server.reload)
            try:
                server.scale(0)
            except prefork.OptionError as error:
                note(f"refused {error}")
            pass_gate("stop")
            assert before == {one: signal.getsignal(one) for one in signal.valid_signals()}
            server.shutdown()
            thread.join()
        note("end")
        """,
    ).ready()
    first = program.wait_ready(2)
    assert "workers" in noted(notes, "refused")[0]
    program.write("more", "")
    assert set(first) <= set(program.wait_ready(4))
    program.write("reload", "")
    second = program.wait_ready(4, without=first)
    program.write("fewer", "")
    assert set(program.wait_children(1)) <= set(second)
    ask(program.address)
    program.write("stop", "")
    assert program.wait_exit().code == 0
    assert notes("end") == [""]
    program.finish()


def test_service_actions(start: Start, notes: Notes) -> None:
    """service_actions() runs in the master about every poll_interval; what it raises is logged and changes nothing."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            def service_actions(self):
                note(f"tick {os.getpid()} {time.monotonic()}")
                if (HOME / "raise").exists():
                    raise ValueError("ordered trouble")

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever(poll_interval=0.1)
        """,
        allow=[patterns.TRACEBACK],
    ).ready()
    already = len(notes("tick"))
    noted(notes, "tick", already + 10)
    rows = [row.split() for row in notes("tick")]
    assert {int(pid) for pid, _ in rows} == {program.pid}
    times = [float(at) for _, at in rows]
    assert times[-1] - times[already] >= 0.1 * (len(times) - already - 1) * 0.5
    program.write("raise", "")
    program.wait_for("service_actions\\(\\) raised", number=2)
    ask(program.address)
    program.finish()


def test_no_wake_ups(start: Start) -> None:
    """Where service_actions() is not overridden an idle master does not wake up at all, nor does a worker."""
    program = launch(start, simple()).ready()
    everybody = [program.pid, *program.wait_ready(2)]
    until(lambda: "State:\tS" in Path(f"/proc/{program.pid}/status").read_text())
    elapse(0.5)
    before = [switches(pid) for pid in everybody]
    elapse(1.5)
    assert [switches(pid) for pid in everybody] == before
    program.finish()


# -- closing ---------------------------------------------------------------------------------------

CLOSING = """
    class Server(prefork.PreforkTCPServer):
        workers = 2
        block_on_close = {block}
        graceful_timeout = {graceful}

    with Server(("127.0.0.1", 0), Handler) as server:
        when("stop", server.shutdown)
        server.serve_forever()
        note(f"returned {{len(server.active_children)}}")
    note(f"closed {{len(server.active_children)}}")
"""


def test_block_on_close(start: Start, notes: Notes) -> None:
    """With block_on_close the drain is waited for: nobody is left when shutdown() and server_close() are back."""
    program = launch(start, CLOSING.format(block=True, graceful=20)).ready()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.write("stop", "")
        program.wait_for(patterns.STOPPING)
        program.wait_children(1)
        assert not notes("returned")
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    assert (notes("returned"), notes("closed")) == (["0"], ["0"])
    program.finish()


def test_no_block_on_close(start: Start, notes: Notes) -> None:
    """Without block_on_close the drain is ordered and goes on behind: the request in progress is answered, all are
    reaped."""
    program = launch(start, CLOSING.format(block=False, graceful=20)).ready()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.write("stop", "")
        noted(notes, "closed")
        program.wait_children(1)
        program.check_no_zombie()
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("block", [True, False])
def test_close_kills_at_last(start: Start, notes: Notes, block: bool) -> None:
    """Who does not drain within graceful_timeout is killed, whether the closing waits for it or not."""
    program = launch(start, CLOSING.format(block=block, graceful=0.3), allow=[patterns.FAULT]).ready()
    with ExitStack() as stack:
        hold(program.address, stack, "deaf")
        noted(notes, "begun")
        program.write("stop", "")
        assert program.wait_exit(10).code == 0
    assert "graceful_timeout" in program.wait_for(patterns.LEFT, number=2)[0] + program.found(patterns.LEFT)[0][0]
    program.finish()


def test_close_without_shutdown(start: Start, notes: Notes) -> None:
    """server_close() from another thread ends a loop that nobody shut down, and leaves nobody."""
    program = launch(
        start,
        """
        server = prefork.PreforkTCPServer(("127.0.0.1", 0), Handler)
        when("close", server.server_close)
        server.serve_forever()
        note(f"returned {len(server.active_children)}")
        server.server_close()
        """,
    ).ready()
    ask(program.address)
    program.write("close", "")
    assert program.wait_exit().code == 0
    assert notes("returned") == ["0"]
    program.finish()


def test_active_children(start: Start, notes: Notes) -> None:
    """`active_children` are the pids of the workers, while there are any."""
    use = "when('look', lambda: note(f'children {sorted(server.active_children)}'))\nserver.serve_forever()"
    program = launch(start, simple(use=use, workers=3)).ready()
    workers = program.wait_ready(3)
    program.write("look", "")
    assert noted(notes, "children") == [str(sorted(workers))]
    program.finish()
