"""The directory in which a program lives, by the name under which it was given.

The directory behind the name may change: a deploy moves a symbolic link. So each child enters it anew before it imports
anything of the program.
"""

import os
import sys

import prefork.kernel.import_path as import_path


class ProgramDirectory:
    """The directory of a program, and the path of its modules.

    Parameters
    ----------
    chdir
        Go there first. Raises OSError.
    """

    def __init__(self, chdir: str = "") -> None:
        name = _name_of_here()
        # The interpreter has made these absolute, by what the directory was then.
        names = {os.path.abspath(entry): _joined(name, entry) for entry in _relative_entries()} if name else {}
        self._path = [names.get(entry, entry) for entry in import_path.command_path or sys.path]
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
            if not import_path.is_standard_entry(entry):  # the cache may be of another directory with the same name
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
