"""A Flask application on Werkzeug's own server, with the mix-in in front of it.

Run `python examples/werkzeug_flask.py [PORT]`, then one of

    curl -sS http://127.0.0.1:9011/hello/Ada
    curl -sS -F file=@README.md http://127.0.0.1:9011/count

Werkzeug's server is meant for development, and here each worker serves one client at a time. The example shows that the
pool works with a server that knows nothing of it. Use the worker class `wsgi` to serve applications.
"""

import os
import sys

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler

from prefork import PreforkMixIn

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 10 << 20  # bytes


@app.get("/hello/<name>")
def hello(name: str) -> ResponseReturnValue:
    return jsonify(hello=name, pid=os.getpid(), several=request.environ["wsgi.multiprocess"])


@app.post("/count")
def count() -> ResponseReturnValue:
    """Lines and bytes of a file."""
    sent = request.files["file"].stream.read()
    return jsonify(lines=sent.count(b"\n"), bytes=len(sent))


class Requests(WSGIRequestHandler):
    # One request a connection. Werkzeug would choose HTTP/1.1 for several processes, but with it an idle client would
    # hold a whole worker.
    protocol_version = "HTTP/1.0"
    timeout = 5.0  # seconds for a client to send its request

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """No access log."""


class FlaskServer(PreforkMixIn, BaseWSGIServer):
    multiprocess = True
    workers = 4
    request_timeout = 30.0


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9011
    with FlaskServer("127.0.0.1", port, app, Requests) as server:
        server.serve_forever()
