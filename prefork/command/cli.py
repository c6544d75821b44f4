"""The command: `prefork MODULE:NAME -b 127.0.0.1:9999 -w 4`.

Exit codes: 0 stopped, 1 an error of the system (an address in use), 2 usage, 3 no worker became ready, 4 the program
cannot be imported.
"""

import argparse
import errno
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence

import prefork.command.option_parser as option_parser
import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.logs as logs
import prefork.kernel.standard_streams as standard_streams
import prefork.workers.lifecycle as lifecycle
from prefork.command.addresses import BindAddress, BindAddresses
from prefork.command.first_lines import first_lines, url
from prefork.command.program import FILE_SETTINGS, Program
from prefork.errors import OptionError, PreforkError, ProgramError, code_of, with_code
from prefork.kernel.listener import describe
from prefork.kernel.own_process import set_title
from prefork.kernel.program_directory import ProgramDirectory
from prefork.link.worker_context import WorkerContext
from prefork.servers.runner import ServerHooks, run_pool
from prefork.settings.settings import Options, declared

log = logs.get("prefork")


# Of an error of the system: what to do, for an address and for the path of a Unix socket.
_MENDS = {
    (errno.EADDRINUSE, False): "; stop what serves there, or choose another with -b",
    (errno.EADDRNOTAVAIL, False): "; this machine has no such address: choose another with -b",
    (errno.EACCES, False): "; a port below 1024 needs a privilege: choose another with -b",
    (errno.ENOENT, True): "; make its directory first, or choose another with -b",
    (errno.EACCES, True): "; this user may not write to its directory: choose another with -b",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    standard_streams.fill()
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        log_stderr.write(option_parser.USAGE)
        return 2
    try:
        given = option_parser.parse(words)
    except OptionError as error:
        return _fail(error)
    with logs.operated(given.log_level):
        try:
            return _serve(given)
        except (PreforkError, OSError) as error:
            return _fail(error, given.program)
        except KeyboardInterrupt:
            return 130
        finally:  # the exit code is decided; the interpreter would print an exception that comes while it ends
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)


def _fail(error: PreforkError | OSError, program: str = "") -> int:
    """Print an error as its one line. Returns the exit code."""
    text = _text_of(error)
    if isinstance(error, ProgramError) and not text.startswith(f"{program.partition(':')[0]}:"):
        text = f"{program}: {text}"
    log_stderr.write(f"prefork: error: {with_code(text, code_of(error))}\n")
    return error.exit_code if isinstance(error, PreforkError) else 1


def _text_of(error: PreforkError | OSError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = str(error.filename or "")
    is_path = where.startswith(("/", "unix"))
    mend = _MENDS.get((error.errno or 0, is_path), "")
    if (error.errno or 0) < 0:  # of getaddrinfo(3), perhaps in a child
        mend = "; it is no address and no name of this machine"
    return f"cannot listen{' on' if where else ''} {where.removesuffix('.lock')}".rstrip() + f": {error.strerror}{mend}"


def _serve(given: argparse.Namespace) -> int:
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # they mean something to a pool only
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # free for the program, in the workers; nothing to the master
    # Until there is a pool. A shell that starts the command in the background has INT and QUIT ignored, and process 1
    # of a container dies only of signals that it handles.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, _leave)
    values = {setting.name: getattr(given, setting.name, None) for setting in declared()}
    flags = {name: value for name, value in values.items() if value is not None}
    try:
        place = ProgramDirectory(given.chdir)
    except OSError as error:
        raise OptionError(f"--chdir: cannot change to {given.chdir!r}: {error.strerror}", code="PF0130") from None
    options = Options(flags)
    addresses = BindAddresses(tuple(BindAddress.parse(text, place) for text in given.bind), os.environ.get("PORT", ""))
    file_settings = [name for name in FILE_SETTINGS if name in flags]
    if file_settings and (abstract := [address.text for address in addresses.typed if address.is_abstract]):
        raise OptionError(f"{file_settings[0]}: {abstract[0]} has no file, everybody here may use it; use a path")
    program = Program(given.program, addresses, place, flags)
    try:
        program.open(options.boot_timeout)
        return _run(program, program.options_of(program.settings))
    finally:
        program.close()


def _leave(signum: int, frame: types.FrameType | None) -> None:
    raise SystemExit(0)


def _run(program: Program, options: Options) -> int:
    def start(context: WorkerContext, unblock: Callable[[], None]) -> int:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        return lifecycle.main(context, program.worker, unblock)

    summary = program.summary
    urls = [url(sock.type, sock.getsockname()) for sock in program.sockets] if summary.speaks_http else []
    for line in first_lines(str(summary), options.workers, filter(None, urls), os.getpid()):
        log.info("%s", line)
    control = None
    if options.control != "none":
        import prefork.operations.place as place  # what is not used is not imported

        control = place.make(options.control) if options.control else place.make_by_default(os.environ)
    set_title(f"prefork: master {program.target} {' '.join(map(describe, program.sockets))}")
    run_pool(
        program.listeners(),
        options,
        start,
        control=control,
        about={"program": program.target, "ends_process": True},
        hooks=ServerHooks(()),  # the master has no program in it, so there is nothing to call
        probe=lambda: program.probe(options.boot_timeout),
        collect=program.collect,
        adopts=os.getpid() == 1,
    )
    log.info("stopped")
    return 0
