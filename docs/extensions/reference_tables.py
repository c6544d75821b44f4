"""Directives that make the tables of the reference from the code: settings, options, names of other servers, exits."""

import argparse
from collections.abc import Iterable

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import prefork
import prefork.command.foreign_options as foreign_options
import prefork.command.option_parser as option_parser
import prefork.errors as errors
from prefork.settings.settings import declared


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    head = list(head)
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def code(text: object) -> str:
    return f"`{text}`" if text != "" else ""


def settings() -> str:
    """All settings, as they are declared."""
    rows = []
    for setting in declared():
        default = "processors" if setting.name == "workers" else repr(setting.__get__(None))
        unit = f"{setting.unit}: " if setting.unit else ""
        rows.append(
            [code(f"{setting.name} = {default}"), unit + setting.help + ("" if setting.flag else " (no option)")]
        )
    return table(["setting and default", "what it does"], rows)


def options() -> str:
    """All options of the command, in their groups."""
    texts = []
    for group in option_parser._parser()._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if actions:
            rows = []
            for action in actions:
                value = f" {action.metavar}" if action.metavar and action.option_strings else ""
                names = ", ".join(action.option_strings) or str(action.metavar)
                rows.append([code(names + value), (action.help or "").replace("%%", "%")])
            texts.append(f"**{group.title}**\n\n" + table(["option", "what it does"], rows))
    return "\n\n".join(texts)


def foreign(server: str) -> str:
    """The options of another server, and what prefork has in their place."""
    rows = []
    for row in (*foreign_options.ACCEPTED, *foreign_options.REFUSED):
        if server in row.whose:
            accepted = row in foreign_options.ACCEPTED
            note = f"the same; prefork's own name is `{row.instead}`" if accepted else row.why
            rows.append([", ".join(map(code, row.names)), code(row.names[0] if accepted else row.instead), note])
    return table([server, "prefork", "note"], rows)


def classes() -> str:
    """The worker classes of other servers, and what prefork has in their place."""
    rows = [[", ".join(map(code, row.names)), code(row.instead), row.why] for row in foreign_options.CLASSES]
    return table(["class", "prefork", "note"], rows)


def exit_codes() -> str:
    """The exit codes of the exceptions."""
    kinds = [getattr(errors, name) for name in ("OptionError", "BootError", "ProgramError")]
    rows = [[str(kind.exit_code), code(kind.__name__), (kind.__doc__ or "").strip()] for kind in kinds]
    system = ["1", code("OSError"), "The system refused, such as an address that is in use or not permitted."]
    stopped = ["0", "", "Stopped by TERM, INT or QUIT."]
    early = ["130", "", "Ctrl-C before there was a pool."]
    return table(["exit code", "exception", "meaning"], [stopped, system, *rows, early])


TABLES = {
    "settings": lambda argument: settings(),
    "options": lambda argument: options(),
    "foreign-options": foreign,
    "foreign-classes": lambda argument: classes(),
    "exit-codes": lambda argument: exit_codes(),
}


class ReferenceTable(SphinxDirective):
    """`{reference-table} settings`; `{reference-table} foreign-options gunicorn`."""

    required_arguments = 1
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        argument = self.arguments[1] if len(self.arguments) > 1 else ""
        return self.parse_text_to_nodes(TABLES[self.arguments[0]](argument))


def setup(app: Sphinx) -> dict[str, object]:
    app.add_directive("reference-table", ReferenceTable)
    return {"version": prefork.__version__, "parallel_read_safe": True}
