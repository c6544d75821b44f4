"""The words of the command line: the options in their groups, and one clear line for what is wrong.

Options are never abbreviated: a later option could make a short form mean something else. An option of another server
is answered by what prefork has in its place (`foreign_options`), an unknown one by the nearest that there is.
"""

import argparse
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import prefork.command.foreign_options as foreign_options
from prefork.command.words import COMMANDS
from prefork.errors import OptionError
from prefork.settings.declaration import Setting
from prefork.settings.settings import declared

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_OPTION = re.compile(r"(--[a-zA-Z][\w-]*|-[a-zA-Z])(.*)", re.DOTALL)

# The groups of `--help`, in order, each with the settings in it.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "workers": ("workers", "worker_class", "threads", "max_connections", "max_surge"),
    "timeouts and limits": (
        *("request_timeout", "boot_timeout", "graceful_timeout", "keepalive_timeout"),
        "max_body",
    ),
    "recycling": ("max_requests", "max_requests_jitter", "max_memory", "max_lifetime"),
    "logs": ("access_log",),
    "Unix sockets": ("unix_mode", "unix_group"),
    "operation": ("control",),
}
SHORT = {"workers": "-w", "worker_class": "-k"}

USAGE = """\
prefork serves a program from a supervised pool of processes. The three commonest uses:

    prefork app:app                  a WSGI or ASGI application `app` in app.py, on http://127.0.0.1:8000
    prefork app:Handler -b 9999      a handler class of socketserver, on another port
    prefork app:app -b 0.0.0.0:80    for other machines too; with -w 8 eight workers

`prefork app` looks in app.py for app, application, create_app and Handler, in this order.
`prefork --help` lists all options.
"""


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage with each error, and ends the process. Here an error is raised, in one line."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))


class _Formatter(argparse.HelpFormatter):
    """Shows the value of an option with several names once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar or ''}".rstrip()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command, by name: a setting that was not given is None.

    Raises
    ------
    OptionError
        Usage. SystemExit is raised after `--help` and `--version`.
    """
    parser = _parser()
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        if word == "--":
            break
        if (match := _OPTION.fullmatch(word)) and not _is_known(match[1], word, known):
            _refuse(match[1], known)
    given, rest = parser.parse_known_args(list(words))
    if given.program is None:
        raise OptionError(
            "name the program: prefork MODULE:NAME, such as prefork app:app for `app` in app.py", code="PF0101"
        )
    if rest:
        hint = f"for an address type -b {rest[0]}" if re.search(r"^\d+$|/|:\d+$", rest[0]) else "there is one program"
        raise OptionError(f"{rest[0]!r} is too much after the program {given.program!r}; {hint}", code="PF0101")
    return given


def _is_known(name: str, word: str, known: Sequence[str]) -> bool:
    return name in known or word.partition("=")[0] in known


def _refuse(name: str, known: Sequence[str]) -> NoReturn:
    """Raise for an option that prefork does not have."""
    if text := foreign_options.refusal(name):
        raise OptionError(text, code="PF0101")
    import difflib  # only an error needs it

    foreign = [name for row in foreign_options.REFUSED for name in row.names]
    if close := difflib.get_close_matches(name, known, 1, 0.7):
        raise OptionError(f"there is no option {name}; did you mean {close[0]}?", code="PF0101")
    if close := difflib.get_close_matches(name, foreign, 1, 0.85):
        raise OptionError(
            f"there is no option {name}; did you mean {close[0]}? {foreign_options.refusal(close[0])}", code="PF0101"
        )
    raise OptionError(f"there is no option {name}; see prefork --help", code="PF0101")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prefork",
        usage="prefork MODULE:NAME [-b ADDRESS] [-w N] [-k CLASS] [OPTION ...]",
        description="Serve a WSGI or ASGI application, or a socketserver handler, from a supervised pool of processes.",
        epilog="Signals: TERM stop, INT/QUIT stop fast, HUP reload, TTIN/TTOU one worker more/fewer, USR1 reopen logs. "
        f"Commands for a running pool: {', '.join(COMMANDS)}; see prefork {next(iter(COMMANDS))} --help.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=_Formatter,
    )
    group = parser.add_argument_group("program and address")
    group.add_argument(
        "program", nargs="?", metavar="MODULE:NAME",
        help="an application, a handler class, a server class, a server, or a function that returns one of these; "
        "MODULE alone: its app, application, create_app or Handler",
    )  # fmt: skip
    group.add_argument(
        "-b", "--bind", action="append", default=[], metavar="ADDRESS",
        help="HOST:PORT, PORT (of this machine only), :PORT (all IPv4 addresses), [::]:PORT (all addresses), a path "
        "with a slash (a Unix socket), udp://HOST:PORT, unixgram:PATH, or unix:@NAME (abstract); may be repeated; "
        "default: 127.0.0.1:8000, or 0.0.0.0:$PORT where PORT is set in the environment",
    )  # fmt: skip
    group.add_argument(
        "--chdir", default="", metavar="DIR", help="run as if it had been started in this directory; it may be a link"
    )
    settings = {setting.name: setting for setting in declared()}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add(group, settings[name])
        if title == "logs":
            levels = ["debug", "info", "warning", "error"]
            group.add_argument("--log-level", choices=levels, default="info", help="default: info", metavar="LEVEL")
    group = parser.add_argument_group("about")
    group.add_argument("-h", "--help", action="help", help="show this text, and exit")
    group.add_argument("--explain", action=_Explain, metavar="CODE", help="explain a message, such as PF0203, and exit")
    group.add_argument("--version", action=_Version, nargs=0, help="show the version, and exit")
    return parser


def _add(group: Any, setting: Setting) -> None:
    flag = f"--{setting.name.replace('_', '-')}"
    names = [SHORT[setting.name], flag] if setting.name in SHORT else [flag]
    names += [name for row in foreign_options.ACCEPTED if row.instead == flag for name in row.names]
    text = setting.help.replace("%", "%%")
    if setting.name == "worker_class":
        text += "; default: what the program needs"
    if callable(setting.default) and not isinstance(setting.default, type):
        text += f" (here: {setting.default()})"
    group.add_argument(
        *names, dest=setting.name, type=_reader(setting), default=None, metavar=_metavar(setting), help=text
    )


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
            parser.error(f"--explain: {error.args[0]}")
        parser.exit()
