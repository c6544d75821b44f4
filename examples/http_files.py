"""Files over HTTP: the standard library's handler, with keep-alive, served by a pool.

Run `python examples/http_files.py [PORT [DIRECTORY]]`, then `curl http://127.0.0.1:9002/`.

It writes http.server's access log to standard error.
"""

import functools
import os
import sys
from http.server import SimpleHTTPRequestHandler

from prefork import BufferedHTTPMixIn, PreforkHTTPServer


class Files(BufferedHTTPMixIn, SimpleHTTPRequestHandler):
    timeout = 5.0  # seconds for a client to send its request


class FileServer(PreforkHTTPServer):
    workers = 4
    keepalive_timeout = 5.0  # seconds for which a connection may be idle


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9002
    directory = sys.argv[2] if len(sys.argv) > 2 else os.getcwd()
    with FileServer(("127.0.0.1", port), functools.partial(Files, directory=directory)) as server:
        server.serve_forever()
