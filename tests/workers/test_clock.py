"""The clock of the machine is set while a pool serves: what it sends and writes has the time that the clock shows."""

from datetime import datetime
from email.utils import parsedate_to_datetime
from time import time

import pytest

from support import Program, until
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

# What a program sees of a clock that is set: before anything of the server is imported, `time.time()` is another one.
PROGRAM = """
import time
from pathlib import Path

true = time.time
time.time = lambda: true() + float(Path("shift").read_text())

import logging
import prefork

logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"] if environ["PATH_INFO"] == "/" else iter([b"ok"])

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

class Pool(prefork.PreforkTCPServer):
    worker_class = "CLASS"
    workers = 1
    access_log = "access.log"

with Pool(("127.0.0.1", 0), CLASS) as server:
    server.serve_forever()
"""


def written(program: Program) -> float:
    """The time of the last line of the access log."""
    line = ["", *(program.work / "access.log").read_text().splitlines()][-1]
    if not line:
        return 0.0
    return datetime.strptime(line[line.index("[") + 1 : line.index("]")], "%d/%b/%Y:%H:%M:%S %z").timestamp()


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_a_clock_that_is_set(start: Start, kind: str) -> None:
    """Set back or forth by an hour, the Date header follows within about a second, and so does the access log."""
    files = {"app.py": PROGRAM.replace("CLASS", kind), "shift": "0"}
    program: Program = start("{work}/app.py", files=files, env=path_of_modules()).ready()
    with Web(program.address) as client:

        def is_right(shift: float) -> bool:
            dates = [client.get(path).headers["date"] for path in ("/", "/iterated")]
            times = [parsedate_to_datetime(date).timestamp() for date in dates]
            times += [written(program)] if kind == "wsgi" else []
            return all(abs(date - time() - shift) < 2.5 for date in times)

        for shift in (0, -3600, 0):
            program.write("shift", str(shift))
            until(lambda shift=shift: is_right(shift), 3, f"the time is shifted by {shift} s")  # type: ignore[misc]
    program.finish()
