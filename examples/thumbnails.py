"""Thumbnails over HTTP: POST an image, get a JPEG of at most SIZE pixels in each direction. Pillow does the work.

Run `python examples/thumbnails.py [PORT]`, then

    curl -fsS --data-binary @photo.png http://127.0.0.1:9008/200 -o small.jpg

What a client may send is limited: bytes, pixels (a small file can claim to be a huge picture), kinds of files, time.
"""

import contextlib
import io
import logging
import sys
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image

from prefork import PreforkMixIn, RequestTimeout

log = logging.getLogger("thumbnails")

MAX_BODY = 10 << 20  # bytes
SIZES = range(16, 1025)
KINDS = ("JPEG", "PNG", "GIF", "WEBP")

Image.MAX_IMAGE_PIXELS = 40_000_000
warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses only what is twice as large


def thumbnail(data: bytes, size: int) -> bytes:
    with Image.open(io.BytesIO(data), formats=KINDS) as image:
        image.draft("RGB", (size, size))  # JPEG: decode no more than is needed
        image.thumbnail((size, size))
        out = io.BytesIO()
        image.convert("RGB").save(out, "JPEG", quality=85)
        return out.getvalue()


class Thumbnails(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # curl asks before it sends much, which is of 1.1
    timeout = 10.0  # seconds for a client to send the next piece
    wbufsize = -1  # one segment, not one for each header

    def do_POST(self) -> None:
        if self.refuse():
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.answer(200, thumbnail(body, int(self.path[1:])), "image/jpeg")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            self.answer(413, b"too many pixels\n")
        except RequestTimeout:
            self.answer(503, b"this took too long\n")
        except Exception as error:  # a decoder may raise anything for a broken file
            log.info("not an image: %r", error)
            self.answer(415, b"not an image that this server reads\n")

    def handle_expect_100(self) -> bool:
        return not self.refuse() and super().handle_expect_100()

    def refuse(self) -> bool:
        """Look at the headers, and answer already if they are wrong."""
        length, size = self.headers.get("Content-Length", ""), self.path[1:]
        if not (length.isdecimal() and len(length) < 20):
            self.answer(411, b"how long is it?\n")
        elif int(length) > MAX_BODY:
            self.answer(413, b"too many bytes\n")
        elif not (size.isdecimal() and len(size) < 5 and int(size) in SIZES):
            self.answer(404, f"POST to a path from /{SIZES[0]} to /{SIZES[-1]}\n".encode())
        else:
            return False
        self.linger()
        return True

    def answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # one request a connection: a worker serves one client at a time
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def linger(self) -> None:
        """Let the client send some more: closing on unread bytes is a reset, which would take the answer with it."""
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.settimeout(0.5)
            for _ in range(2 * MAX_BODY >> 16):
                if not self.connection.recv(65536):
                    break

    def log_message(self, format: str, *args: object) -> None:
        log.info(format, *args)


class ThumbnailServer(PreforkMixIn, HTTPServer):
    request_timeout = 15.0  # workers: as many as there are processors


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9008
    with ThumbnailServer(("127.0.0.1", port), Thumbnails) as server:
        server.serve_forever()
