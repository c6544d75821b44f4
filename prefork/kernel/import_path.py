"""Where modules come from: those of prefork and of Python are not shadowed by files of a program.

A program's folder may hold a `queue.py`. The command imports the modules that it needs before such a folder is on the
path. So this module is the first to be imported, and imports nothing itself that the interpreter does not hold already.
A standard module that prefork has imported by then is also what `import queue` gives to the program: there is one
module per name.

In a script that imports prefork nothing is done here: it has decided by then what comes first.
"""

import os
import sys
from types import TracebackType

_STANDARD = os.path.dirname(os.__file__)
command_path: list[str] = []  # `sys.path` as the command got it, without a directory that `python -m` puts there
# Modules of the program with the name of a standard module that prefork has imported beside them.
shadowing: dict[str, object] = {}


def _is_command() -> bool:
    """Whether this process was started as `prefork`, or by `python -m prefork`, which is looking for it now."""
    if sys.argv[:1] == ["-m"]:
        word = sys.orig_argv[-len(sys.argv)]
        return word == "prefork" or (word[0] == "-" and word.endswith("mprefork"))
    return os.path.basename("".join(sys.argv[:1])) == "prefork"


def is_standard_entry(entry: str) -> bool:
    """Whether an entry of `sys.path` is the standard library's."""
    return (entry.startswith(_STANDARD) and "-packages" not in entry) or os.path.basename(entry) == "lib-dynload"


def _standard_first(path: list[str]) -> list[str]:
    """The standard library comes first, also before the entries of PYTHONPATH: those are meant for the program."""
    return sorted(path, key=lambda entry: not is_standard_entry(entry))


is_command = _is_command()
if is_command:
    if sys.argv[0] == "-m" and not sys.flags.safe_path:
        del sys.path[0]  # the current directory
    command_path = sys.path[:]
    sys.path[:] = _standard_first(command_path)


class OwnImports:
    """`with OwnImports():` is for the import of a module of prefork in a process in which the program is, or may be.

    Neither the program's folder nor a module of the program with the name of a standard one gets in between.
    """

    def __enter__(self) -> None:
        self._path = sys.path[:]
        self._aside = {
            name: module
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] in sys.stdlib_module_names and not _is_standard(module)
        }
        for name in self._aside:
            del sys.modules[name]
        added = [entry for entry in sys.path if entry not in command_path] if command_path else []
        # An entry point of the program's may lie in what was added.
        sys.path[:] = [*_standard_first(command_path or sys.path), *added]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.path[:] = self._path
        shadowing.update({name: module for name, module in self._aside.items() if name in sys.modules})
        sys.modules.update(self._aside)


def attribute(names: dict[str, object], modules: dict[str, str], name: str) -> object:
    """For a package's `__getattr__`: a name that a module of prefork's defines, which is imported now.

    Parameters
    ----------
    names
        The package's `globals()`, in which the name is kept.
    modules
        Of each name the module.
    """
    if name not in modules:
        raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
    with OwnImports():
        import importlib

        names[name] = getattr(importlib.import_module(modules[name]), name)
    return names[name]


def _is_standard(module: object) -> bool:
    """Whether a module with the name of a standard module is that module."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or getattr(module, "__file__", None)
    if not isinstance(origin, str) or not os.path.isabs(origin):  # built in, frozen; or made by nobody's import
        return True
    folder = os.path.dirname(origin)
    return is_standard_entry(folder) or is_standard_entry(os.path.realpath(folder))
