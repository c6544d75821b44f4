"""Files over HTTP: the standard library's server and handler, served by a pool.

Run `python examples/http_files.py [PORT [DIRECTORY]]`, then `curl http://127.0.0.1:9002/`.

It writes http.server's access log to standard error. The handler speaks HTTP/1.0, one request a connection, which suits
workers that serve one client at a time.
"""

import functools
import os
import sys
from http.server import HTTPServer, SimpleHTTPRequestHandler

from prefork import PreforkMixIn


class Files(SimpleHTTPRequestHandler):
    timeout = 5.0  # seconds for a client to send its request


class FileServer(PreforkMixIn, HTTPServer):
    workers = 4


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9002
    directory = sys.argv[2] if len(sys.argv) > 2 else os.getcwd()
    with FileServer(("127.0.0.1", port), functools.partial(Files, directory=directory)) as server:
        server.serve_forever()
