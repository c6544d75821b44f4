"""From the words `MODULE:NAME` to the object: imports the program's module and finds NAME in it.

Without a NAME the first of `NAMES` that the module has is taken. `NAME()` stands for what a call of NAME returns. This
runs in children of the command only.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from typing import Any

from prefork.command.inspection import describe
from prefork.command.probe import own_traceback
from prefork.errors import OptionError, ProgramError
from prefork.kernel.program_directory import ProgramDirectory
from prefork.rules.program_kind import ProgramKind, kind_of

NAMES = ("app", "application", "create_app", "Handler")  # what `prefork MODULE` looks for, in this order

_DEFINED = (type, types.FunctionType, types.BuiltinFunctionType)
_FILE = re.compile(r"(?P<folder>.*/)?(?P<module>[^/:]+?)(?:\.py)?(?::(?P<name>.*))?")


def load(target: str, place: ProgramDirectory) -> tuple[str, Any]:
    """Import `MODULE:NAME`. Returns the name with what was found for it, `MODULE:NAME` in full, and the object.

    Raises
    ------
    OptionError
        The words are no `MODULE:NAME`; it says what to type.
    ProgramError
        There is no such module or name, or its import or its call raises; then with the program's own traceback.
    """
    module_name, is_call, name = parse(target)
    _refuse_shadowed(module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            head, dot, tail = module_name.rpartition(".")
            hint = f"; did you mean {head}:{tail}?" if dot and not name else _similar_module(module_name, place)
            raise ProgramError(
                f"there is no module {error.name!r} in {place} or on the module path{hint}", code="PF0121"
            ) from None
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}", code="PF0122") from None
    except BaseException:
        raise ProgramError(f"{module_name!r} cannot be imported\n{own_traceback()}", code="PF0122") from None
    name = name or _usual_name(module)
    named: Any = module
    for part in name.split("."):
        try:
            named = getattr(named, part)
        except AttributeError:
            raise ProgramError(
                f"module {module_name!r} has no {name!r}{_similar_name(module, name)}", code="PF0123"
            ) from None
    if not is_call:
        return f"{module_name}:{name}", named
    try:
        return f"{module_name}:{name}()", named()
    except BaseException:
        raise ProgramError(f"{target} raised\n{own_traceback()}") from None


def parse(target: str) -> tuple[str, bool, str]:
    """The module, whether NAME is to be called, and NAME; "": the usual one.

    Raises
    ------
    OptionError
        saying what to type.
    """
    module_name, colon, name = target.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise OptionError(f"{target!r} is the name of a file; {_instead_of_file(target)}", code="PF0129")
    is_call = name.endswith("()")
    name = name.removesuffix("()")
    if "(" in name:
        raise OptionError(
            f"{target!r}: a call takes no arguments here; write a function that makes the application, and name that",
            code="PF0129",
        )
    parts = [*module_name.split("."), *(name.split(".") if colon else [])]
    if not all(part.isidentifier() for part in parts):
        raise OptionError(
            f"{target!r} is no program; write MODULE:NAME, such as app:app for `app` in app.py", code="PF0129"
        )
    return module_name, is_call, name


def _instead_of_file(target: str) -> str:
    match = _FILE.fullmatch(target)
    if match is None or not match["module"].isidentifier():
        return "write MODULE:NAME, such as app:app for `app` in app.py"
    folder = match["folder"] or ""
    folder = "" if folder.strip("./") == "" and ".." not in folder and folder[:1] != "/" else folder
    name = f":{match['name']}" if match["name"] else ""
    return f"type the module: prefork {f'--chdir {folder} ' if folder else ''}{match['module']}{name}"


def _usual_name(module: types.ModuleType) -> str:
    """The name that a module has for what is served."""
    for name in NAMES:
        if not isinstance(getattr(module, name, module), types.ModuleType):
            return name
    inner = _served_name(module)
    for part in ("wsgi", "asgi"):  # a project of Django has them beside its settings
        with contextlib.suppress(Exception):
            if not inner and importlib.util.find_spec(f"{module.__name__}.{part}") is not None:
                inner = f"; type prefork {module.__name__}.{part}"
                break
    raise ProgramError(
        f"module {module.__name__!r} has no {', '.join(NAMES[:-1])} or {NAMES[-1]}"
        + (inner or f"; type prefork {module.__name__}:NAME"),
        code="PF0123",
    )


def _served_name(module: types.ModuleType) -> str:
    """What to type, where the module itself defines something that is no function and is served."""
    for name, named in vars(module).items():
        kind = kind_of(describe(named))
        is_own_class = kind.is_handler and named.__module__ == module.__name__
        is_object = kind is ProgramKind.SERVER or (kind.is_application and not isinstance(named, _DEFINED))
        if not name.startswith("_") and (is_own_class or is_object):
            return f"; type prefork {module.__name__}:{name}"
    return ""


def _similar_module(wanted: str, place: ProgramDirectory) -> str:
    names = []
    with contextlib.suppress(OSError):
        names = [entry.removesuffix(".py") for entry in os.listdir(place.name or ".") if entry.endswith(".py")]
    return _did_you_mean(wanted, names)


def _similar_name(module: types.ModuleType, wanted: str) -> str:
    return _did_you_mean(wanted, [name for name in vars(module) if not name.startswith("_")])


def _did_you_mean(wanted: str, names: list[str]) -> str:
    import difflib  # only an error needs it

    close = difflib.get_close_matches(wanted, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _refuse_shadowed(name: str) -> None:
    """Raises ProgramError for a module of the program that cannot be imported, since another one has its name."""
    imported = sys.modules.get(name)
    if imported is None and name not in sys.builtin_module_names:
        return
    spec = importlib.machinery.PathFinder.find_spec(name)
    file = getattr(imported, "__file__", None)
    if spec is not None and spec.origin and os.path.realpath(spec.origin) != os.path.realpath(file or ""):
        other = f"{file}, which prefork stands on" if file else "a module that is built into Python"
        raise ProgramError(
            f"{spec.origin} cannot be imported: {name!r} is the name of {other}; rename it", code="PF0127"
        )
