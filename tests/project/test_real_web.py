"""Servers of the world on the pool: thumbnails, JSON and Flask, asked by curl and wrk."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from support.examples import EXAMPLES, Busy, Start, reload, tool


def curl(port: int, path: str, *words: object, stdin: bytes = b"") -> tuple[int, bytes]:
    """Status and body."""
    url = f"http://127.0.0.1:{port}/{path}"
    command = [tool("curl"), "-sS", "--noproxy", "*", "-w", "%{stderr}%{http_code}", *map(str, words), url]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=True)
    return int(done.stderr), done.stdout


def processors() -> int:
    return len(os.sched_getaffinity(0))


def wrk_is_pleased(out: str) -> int:
    """wrk saw no error of any kind; how many requests it made."""
    assert "Socket errors" not in out and "Non-2xx" not in out, out
    match = re.search(r"(\d+) requests in", out)
    assert match, out
    return int(match[1])


# -- thumbnails --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo.png, photo.jpg; half.png; two small files of too many pixels; big, 11 MB of nothing."""
    path = tmp_path_factory.mktemp("pictures")
    image = Image.effect_mandelbrot((1200, 800), (-2.0, -1.0, 1.0, 1.0), 20)
    image.save(path / "photo.png")
    image.save(path / "photo.jpg")
    Image.new("1", (7000, 7000)).save(path / "large.png")
    Image.new("1", (10000, 10000)).save(path / "bomb.png")
    whole = (path / "photo.png").read_bytes()
    (path / "half.png").write_bytes(whole[: len(whole) // 2])
    (path / "big").write_bytes(bytes(11_000_000))
    return path


def test_thumbnails(example: Start, port: int, pictures: Path) -> None:
    """curl gets a JPEG of the size it asked for; what is broken, too large, or a bomb is refused, and all live on."""
    program = example("thumbnails", port, workers=processors())
    pids = program.children()
    for name in ("photo.png", "photo.jpg"):
        status, body = curl(port, "200", "--data-binary", f"@{pictures / name}")
        with Image.open(io.BytesIO(body)) as small:
            assert (status, small.format, small.size) == (200, "JPEG", (200, 133))
    for path, name, wanted in (
        ("200", "large.png", 413),
        ("200", "bomb.png", 413),
        ("200", "big", 413),
        ("200", "half.png", 415),
        ("2000", "photo.png", 404),
        ("..", "photo.png", 404),
    ):
        assert curl(port, path, "--data-binary", f"@{pictures / name}")[0] == wanted, name
        assert curl(port, path, "-H", "Expect:", "--data-binary", f"@{pictures / name}")[0] == wanted, name
    assert (
        curl(port, "200", "-H", "Transfer-Encoding: chunked", "--data-binary", f"@{pictures / 'photo.jpg'}")[0] == 411
    )
    assert program.children() == pids
    program.finish()


def test_thumbnails_under_wrk(example: Start, port: int, pictures: Path, tmp_path: Path) -> None:
    """wrk, which posts a picture all the time, sees no error while the pool is reloaded."""
    program = example("thumbnails", port, workers=processors())
    script = tmp_path / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.path = '/64'\nwrk.body = io.open('{pictures / 'photo.jpg'}', 'rb'):read('*a')\n"
    )
    wrk = Busy("wrk", "-t1", "-c8", "-d2", "-s", script, f"http://127.0.0.1:{port}/64")
    program.wait_for('"POST /64 HTTP/1.1" 200')
    reload(program, processors())
    assert wrk_is_pleased(wrk.result()) > 20
    program.finish()


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_compute(example: Start, port: int) -> None:
    """curl gets results and errors as JSON, with the status that fits."""
    program = example("json_compute", port, workers=processors())
    pids = program.children()

    def call(path: str, body: str) -> tuple[int, dict[str, object]]:
        status, answer = curl(port, path, "--data-binary", "@-", stdin=body.encode())
        found: dict[str, object] = json.loads(answer)
        return status, found

    assert call("factors", "[600851475143]") == (200, {"result": [71, 839, 1471, 6857]})
    assert call("factors", "[1024]") == (200, {"result": [2] * 10})
    assert call("pi", "[20]") == (200, {"result": "3.1415926535897932384"})
    pid = call("pid", "[]")[1]["result"]
    assert isinstance(pid, int) and pid in pids
    for path, body, status, says in (
        ("none", "[]", 404, "no such function"),
        ("pi", "[1", 400, "delimiter"),
        ("pi", "{}", 400, "must be a list"),
        ("pi", "[]", 400, "missing 1 required"),
        ("pi", '["x"]', 400, "from 1 to 4000"),
        ("factors", "[1e300]", 400, "a whole number"),
        ("pi", "[" * 4000, 400, ""),  # too deep for some versions, unfinished for others
        ("pi", "[" + " " * 5000 + "1]", 400, "at most 4096 bytes"),
    ):
        got, answer = call(path, body)
        assert got == status and says in str(answer["error"]), (path, body, answer)
    assert program.children() == pids
    program.finish()
    assert program.log == ""


def test_json_compute_in_time(start: Start, port: int) -> None:
    """What takes too long is answered 503, by a worker that lives on; the command serves the handler."""
    files = {"json_compute.py": (EXAMPLES / "json_compute.py").read_text(encoding="utf-8")}
    bind = f"tcp://127.0.0.1:{port}"
    program = start("prefork", "json_compute:Calls", "-b", bind, "-w", 1, "--request-timeout", 0.5, files=files)
    pids = program.wait_ready(1, 10)
    status, answer = curl(port, "factors", "-d", "[999999999999999989]")
    assert status == 503 and b"took longer than 0.5 s" in answer
    assert curl(port, "pi", "-d", "[3]") == (200, b'{"result": "3.14"}\n')
    assert program.children() == pids
    program.finish()


# -- Flask -------------------------------------------------------------------------------------------------------------


def test_werkzeug_flask(example: Start, port: int, tmp_path: Path) -> None:
    """curl gets what the Flask application says, and an upload is counted."""
    program = example("werkzeug_flask", port)
    status, body = curl(port, "hello/Ada")
    told = json.loads(body)
    assert status == 200 and told["hello"] == "Ada" and told["several"] is True
    assert told["pid"] in program.children()
    (tmp_path / "file").write_bytes(b"one\ntwo\n" * 100_000)
    assert json.loads(curl(port, "count", "-F", f"file=@{tmp_path / 'file'}")[1]) == {"lines": 200000, "bytes": 800000}
    assert curl(port, "none")[0] == 404
    program.finish()
    assert program.log == ""


def test_werkzeug_flask_under_wrk(example: Start, port: int) -> None:
    """wrk sees no error while the pool is reloaded twice."""
    program = example("werkzeug_flask", port)
    wrk = Busy("wrk", "-t1", "-c16", "-d2", f"http://127.0.0.1:{port}/hello/wrk")
    reload(program, 4)
    reload(program, 4)
    assert wrk_is_pleased(wrk.result()) > 100
    program.finish()
    assert program.log == ""
