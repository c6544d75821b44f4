"""Where modules come from: prefork's own from where it is installed, a program's from its directory.

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
_path: list[str] = []  # what the command found in `sys.path`, apart from a directory that `python -m` puts there
# Modules of the program with the name of a standard one, where prefork has imported the standard one beside them.
doubles: dict[str, object] = {}


def _is_command() -> bool:
    """Whether this process was started as `prefork`, or by `python -m prefork`, which is looking for it now."""
    if sys.argv[:1] == ["-m"]:
        word = sys.orig_argv[-len(sys.argv)]
        return word == "prefork" or (word[0] == "-" and word.endswith("mprefork"))
    return os.path.basename("".join(sys.argv[:1])) == "prefork"


def _is_standard_entry(entry: str) -> bool:
    return (entry.startswith(_STANDARD) and "-packages" not in entry) or os.path.basename(entry) == "lib-dynload"


def _standard_first(path: list[str]) -> list[str]:
    """Also before what PYTHONPATH names: that is meant for the program."""
    return sorted(path, key=lambda entry: not _is_standard_entry(entry))


if _is_command():
    if sys.argv[0] == "-m" and not sys.flags.safe_path:
        del sys.path[0]  # the current directory
    _path = sys.path[:]
    sys.path[:] = _standard_first(_path)


class Own:
    """`with Own():` stands around the import of a module of prefork in a process in which the program may be imported.

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
        added = [entry for entry in sys.path if entry not in _path] if _path else []
        sys.path[:] = [*_standard_first(_path or sys.path), *added]  # where an entry point of the program's may lie

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.path[:] = self._path
        doubles.update({name: module for name, module in self._aside.items() if name in sys.modules})
        sys.modules.update(self._aside)


def _is_standard(module: object) -> bool:
    """Whether a module with the name of a standard one is that one."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or getattr(module, "__file__", None)
    if not isinstance(origin, str) or not os.path.isabs(origin):  # built in, frozen; or made by nobody's import
        return True
    folder = os.path.dirname(origin)
    return _is_standard_entry(folder) or _is_standard_entry(os.path.realpath(folder))


class Place:
    """The directory in which a program lives, by the name under which it was given, and the path of its modules.

    The directory behind the name may change: a deploy moves a symbolic link. So each child enters it anew.

    Parameters
    ----------
    chdir
        Go there first. Raises OSError.
    """

    def __init__(self, chdir: str = "") -> None:
        name = _name_of_here()
        # The interpreter has made these absolute, by what the directory was then.
        names = {os.path.abspath(entry): _joined(name, entry) for entry in _relative_entries()} if name else {}
        self._path = [names.get(entry, entry) for entry in _path or sys.path]
        if chdir:
            os.chdir(chdir)
            name = os.path.join(name, chdir)
        self.name = name  # "" where it had been removed already

    def absolute(self, path: str) -> str:
        """A path of the command line or of the program, made absolute: it is the same for each process of the pool."""
        return os.path.join(self.name, path)

    def enter(self) -> None:
        """In a child, before anything of the program is imported: go to the directory, and put it on the path.

        A directory that is gone is no error here: the program may lie elsewhere.
        """
        sys.path[:] = self._path if not self.name or self.name in self._path else [self.name, *self._path]
        for entry in list(sys.path_importer_cache):
            if not _is_standard_entry(entry):  # the cache may be of another directory with the same name
                del sys.path_importer_cache[entry]
        try:
            os.chdir(self.name)
        except OSError:
            return
        os.environ["PWD"] = self.name  # not in the master: titles of processes are written over its environment
        if loaded := sys.modules.get("multiprocessing.process"):
            loaded.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]  # where a process that is spawned begins

    def __str__(self) -> str:
        if not self.name:
            return "the current directory (which was removed)"
        return self.name if os.path.isdir(self.name) else f"{self.name} (which was removed)"


def here() -> str:
    """The current directory as the kernel calls it; "" where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _name_of_here() -> str:
    """The current directory by the shell's name for it, or else by the kernel's; "" where it is gone."""
    name, directory = os.environ.get("PWD", ""), here()
    known = directory and os.path.isabs(name) and os.path.isdir(name) and os.path.samefile(name, directory)
    return name if known else directory


def _relative_entries() -> list[str]:
    entries = [] if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if not os.path.isabs(entry)]


def _joined(directory: str, entry: str) -> str:
    return directory if entry in ("", ".") else os.path.join(directory, entry)
