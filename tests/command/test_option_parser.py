"""The words of the command line: own options, those of other servers, and what is said of a wrong one."""

from collections.abc import Iterator

import pytest

import prefork.command.foreign_options as foreign_options
from prefork.command import option_parser
from prefork.errors import OptionError
from prefork.settings.settings import declared


def refusal(*words: str) -> str:
    with pytest.raises(OptionError) as caught:
        option_parser.parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def own_names() -> Iterator[str]:
    for action in option_parser._parser()._actions:
        yield from action.option_strings


def test_every_setting_is_in_one_group() -> None:
    """`--help` shows every setting that has a flag once, and nothing else of them."""
    grouped = [name for names in option_parser.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(setting.name for setting in declared() if setting.flag)


def test_another_name_for_the_same() -> None:
    """gunicorn's names that mean the same set the same setting."""
    words = [
        "app:app",
        "--keep-alive",
        "3",
        "--access-logfile",
        "-",
        "--worker-connections",
        "7",
        "-k",
        "wsgi",
        "-w",
        "2",
        "-b",
        ":80",
        "--bind",
        ":81",
    ]
    given = option_parser.parse(words)
    assert (given.keepalive_timeout, given.access_log, given.max_connections) == (3.0, "-", 7)
    assert (given.worker_class, given.workers, given.bind, given.program) == ("wsgi", 2, [":80", ":81"], "app:app")


def test_values_in_any_notation() -> None:
    """A value may be attached, follow `=`, or be the next word; the program may stand anywhere."""
    for words in (["-w4", "app"], ["-w=4", "app"], ["app", "--workers=4"], ["--workers", "4", "app"]):
        assert option_parser.parse(words).workers == 4


@pytest.mark.parametrize("row", foreign_options.REFUSED, ids=lambda row: row.names[0])
def test_options_of_others(row: foreign_options.ForeignOption) -> None:
    """An option of another server is answered by what prefork has instead, or by why it has none; none of its words is
    taken for the program."""
    for name in row.names:
        for words in ((name, "value", "app:app"), ("app:app", f"{name}=value")):
            text = refusal(*words)
            assert f"prefork has no option {name} " in text and (row.instead or row.why) in text


def test_what_is_named_instead_is_there() -> None:
    """Every option that an answer names is one of prefork's, and none is both refused and accepted."""
    own = set(own_names())
    for row in (*foreign_options.REFUSED, *foreign_options.ACCEPTED, *foreign_options.CLASSES):
        named = [word for word in row.instead.replace(",", " ").split() if word.startswith("-")]
        assert own.issuperset(named), row
    refused = {name for row in foreign_options.REFUSED for name in row.names}
    assert not refused & own
    assert {name for row in foreign_options.ACCEPTED for name in row.names} <= own
    assert all(row.instead or row.why for row in foreign_options.REFUSED)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("app:app", "--worker", "3"), "did you mean --workers?"),
        (("app:app", "--max-request", "3"), "did you mean --max-requests?"),
        (("app:app", "--pidfil", "x"), "--pidfile"),
        (("app:app", "--qwertz"), "see prefork --help"),
        (("app:app", "-Z"), "see prefork --help"),
        (("app:app", "8000"), "-b 8000"),
        (("app:app", "0.0.0.0:80"), "-b 0.0.0.0:80"),
        (("serve", "app:app"), "'app:app' is too much after the program 'serve'"),
        (("-w", "2"), "prefork MODULE:NAME"),
        (("app:app", "-w"), "-w/--workers: expected one argument"),
        (("app:app", "-w", "app:app"), "-w/--workers: must be a whole number"),
        (("app:app", "--log-level", "loud"), "--log-level: invalid choice"),
        (("app:app", "--max-memory", "-5M"), "--max-memory"),
        (("app:app", "--request", "5"), "--request"),
    ],
)
def test_wrong_words(words: tuple[str, ...], says: str) -> None:
    """What is wrong is one line that names it, and the mend; no option is abbreviated."""
    assert says in refusal(*words)


def test_worker_classes_of_others() -> None:
    """A worker class of another server is answered by the name of ours."""
    assert "-k wsgi --threads N" in str(foreign_options.class_refusal("gthread"))
    for name in ("uvicorn.workers.UvicornWorker", "uvicorn_worker.UvicornWorker"):
        assert "-k asgi" in str(foreign_options.class_refusal(name))
    assert foreign_options.class_refusal("wsgi") is None


def test_the_usage_is_eight_lines() -> None:
    """Without a word the command shows the three commonest uses."""
    lines = option_parser.USAGE.splitlines()
    assert len(lines) <= 8 and sum(line.startswith("    prefork ") for line in lines) == 3
