"""The command: `prefork MODULE:NAME -b tcp://127.0.0.1:9999 -w 4`.

Exit codes: 0 stopped, 1 an error of the system (an address in use), 2 usage, 3 no worker became ready, 4 the program
cannot be imported.
"""

import argparse
import contextlib
import os
import signal
import types
from collections.abc import Callable, Sequence

import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.logs as logs
import prefork.kernel.standard_streams as standard_streams
import prefork.workers.lifecycle as lifecycle
from prefork.command.addresses import BindAddress
from prefork.command.program import FILE_SETTINGS, Program
from prefork.errors import OptionError, PreforkError, ProgramError
from prefork.kernel.listener import describe
from prefork.kernel.own_process import set_title
from prefork.kernel.program_directory import ProgramDirectory
from prefork.link.worker_context import WorkerContext
from prefork.servers.runner import ServerHooks, run_pool
from prefork.settings.declaration import Setting
from prefork.settings.settings import Options, declared

log = logs.get("prefork")

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    standard_streams.fill()
    given = _parser().parse_args(arguments)
    with logs.operated(given.log_level):
        try:
            return _serve(given)
        except (PreforkError, OSError) as error:
            code = error.exit_code if isinstance(error, PreforkError) else 1
            text = f"{given.program}: {error}" if isinstance(error, ProgramError) else _text_of(error)
            log_stderr.write(f"prefork: error: {text}\n")
            return code
        except KeyboardInterrupt:
            return 130


def _text_of(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    return f"cannot listen{' on' if where else ''}{where}: {error.strerror}"


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
        raise OptionError(f"--chdir: {given.chdir!r} cannot be gone to: {error.strerror}") from None
    options = Options(flags)
    addresses = [BindAddress.parse(text, place) for text in given.bind]
    file_settings = [name for name in FILE_SETTINGS if name in flags]
    if file_settings and (abstract := [address.text for address in addresses if address.is_abstract]):
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

    set_title(f"prefork: master {program.target} {' '.join(map(describe, program.sockets))}")
    run_pool(
        program.listeners(),
        options,
        start,
        ServerHooks(()),  # the master has no program in it, so there is nothing to call
        probe=lambda: program.probe(options.boot_timeout),
        collect=program.collect,
        adopts=os.getpid() == 1,
    )
    log.info("stopped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefork",
        description="Serve a socketserver handler from a supervised pool of processes.",
        epilog="Signals: TERM stop, INT/QUIT stop fast, HUP reload, TTIN/TTOU one worker more/fewer, USR1 reopen logs.",
    )
    parser.add_argument(
        "program", metavar="MODULE:NAME", help="a handler class, a server class, or a callable that returns a server"
    )
    parser.add_argument(
        "-b", "--bind", action="append", default=[], metavar="ADDRESS",
        help="tcp://HOST:PORT, udp://HOST:PORT, unix:PATH or unixgram:PATH (@NAME: abstract); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--chdir", default="", metavar="DIR", help="run as if it had been started in this directory; it may be a link"
    )
    for setting in declared():
        if setting.flag:
            names = [f"--{setting.name.replace('_', '-')}"]
            parser.add_argument(
                *(["-w", *names] if setting.name == "workers" else names),
                dest=setting.name, type=_reader(setting), default=None, metavar=_metavar(setting),
                help=setting.help.replace("%", "%%"),
            )  # fmt: skip
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info", help="default: info"
    )
    parser.add_argument(
        "--explain", action=_Explain, metavar="CODE", help="explain a message, such as PF0203, and exit"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and exit")
    return parser


def _metavar(setting: Setting) -> str:
    if setting.octal or setting.name == "unix_group":
        return "MODE" if setting.octal else "GROUP"
    if setting.unit:
        return setting.unit.upper()
    return {object: "CLASS", str: "FILE"}.get(setting.kind, "N")


def _reader(setting: Setting) -> Callable[[str], object]:
    """Reads a flag's value. The setting's own words say when that is out of range."""

    def read(text: str) -> object:
        if setting.kind in (object, str):
            return text
        value: object = text
        number, factor = text, 1
        if setting.unit == "bytes" and text[-1:].upper() in _SUFFIXES:
            number, factor = text[:-1], _SUFFIXES[text[-1].upper()]
        with contextlib.suppress(ValueError):
            value = int(number, 8 if setting.octal else 10) * factor if setting.kind is int else float(number)
        try:
            return setting.check(value)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return read


class _Version(argparse.Action):
    """argparse's own needs the text at each start, which takes 20 ms to find."""

    def __call__(self, parser: argparse.ArgumentParser, *of_the_option: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("prefork")
        except PackageNotFoundError:
            text = "(not installed)"
        print(f"prefork {text}")
        parser.exit()


class _Explain(argparse.Action):
    """Shows the page of a message code."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, code: object, option: object = None) -> None:
        from prefork.command.explain import page

        try:
            print(page(str(code)), end="")
        except LookupError as error:
            parser.exit(2, f"prefork: error: --explain: {error.args[0]}\n")
        parser.exit()
