"""What `make clean` and `make test-next` refuse, and that neither harms what is mounted in the chroot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "next"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="this is no checkout"),
    pytest.mark.skipif(not shutil.which("make"), reason="needs make"),
]

MOUNTED = """
mount --bind "$0/precious" "$0/.build/sid/tmp"
make -C "$0" clean PYTHON="$1"
echo "code $?"
umount "$0/.build/sid/tmp"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, a chroot with nothing in it, and a file that must stay."""
    shutil.copytree(SCRIPT.parent, tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".build" / "sid" / "tmp").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("of somebody else")
    return tmp_path


def clean(checkout: Path) -> "subprocess.CompletedProcess[str]":
    words: list[str | Path] = ["make", "-C", checkout, "clean", f"PYTHON={sys.executable}"]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)


def test_clean_follows_no_mount(checkout: Path) -> None:
    """`make clean` removes nothing while something is mounted in the chroot, and all of it afterwards."""
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() or subprocess.run([*namespace, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs root, and the right to mount")
    words: list[str | Path] = [*namespace, "sh", "-c", MOUNTED, checkout, sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    assert "code 2" in done.stdout and f" {checkout}/.build/sid/tmp " in done.stdout
    assert "clean: the above is mounted in .build; unmount it first" in done.stderr
    assert (checkout / "precious" / "file").exists() and (checkout / ".build" / "sid").exists()
    assert clean(checkout).returncode == 0
    assert (checkout / "precious" / "file").exists() and not (checkout / ".build").exists()


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_clean_waits_for_no_tests(checkout: Path) -> None:
    """`make clean` removes nothing while tests run in the chroot."""
    lock = checkout / ".build" / "sid.lock"
    with subprocess.Popen(["flock", lock, "sh", "-c", "echo locked; read line"], stdin=-1, stdout=-1) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline() == b"locked\n"
        done = clean(checkout)
        assert done.returncode == 2 and "test-next` runs in .build/sid" in done.stderr
        assert (checkout / ".build" / "sid").exists()
        holder.stdin.close()
    assert clean(checkout).returncode == 0 and not lock.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_without_root() -> None:
    """Who is not root is told so in one line, before anything is made."""
    script = SCRIPT.read_bytes()
    done = subprocess.run(
        ["bash", "-s"], input=script, cwd="/", user=65534, capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr == b"test-next: needs root, to make a chroot and to mount in it: run it with sudo\n"
