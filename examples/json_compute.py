"""Call functions with JSON over HTTP: the path names the function, the body is the list of its arguments.

Run `python examples/json_compute.py [PORT]`, then one of

    curl -sS -d '[600851475143]' http://127.0.0.1:9009/factors
    curl -sS -d '[50]' http://127.0.0.1:9009/pi

The answer is an object with `result` or `error`. The length of a body and the time of a request are limited.
"""

import json
import os
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

from prefork import PreforkMixIn, RequestTimeout

MAX_BODY = 4096  # bytes


def factors(number: object) -> list[int]:
    """The prime factors of a number, the smallest first."""
    if not isinstance(number, int) or not 1 < number < 10**18:
        raise ValueError("factors takes a whole number from 2 to 10**18")
    found: list[int] = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1 if divisor == 2 else 2
    return found + [number] * (number > 1)


def pi(digits: object) -> str:
    """So many digits of pi, by Machin's formula."""
    if not isinstance(digits, int) or not 1 <= digits <= 4000:
        raise ValueError("pi takes a number of digits from 1 to 4000")
    one: int = 10 ** (digits + 10)

    def arctan_of_inverse(x: int) -> int:
        total = term = one // x
        n, sign = 3, -1
        while term:
            term //= x * x
            total += sign * (term // n)
            n, sign = n + 2, -sign
        return total

    text = str(4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)) // 10**11)
    return f"{text[0]}.{text[1:]}" if digits > 1 else text[0]


FUNCTIONS: dict[str, Callable[..., object]] = {"/factors": factors, "/pi": pi, "/pid": os.getpid}


class Calls(BaseHTTPRequestHandler):
    timeout = 5.0  # seconds for a client to send its call
    wbufsize = -1

    def do_POST(self) -> None:
        try:
            self.answer(200, {"result": self.call()})
        except LookupError:
            self.answer(404, {"error": f"no such function; there are {', '.join(FUNCTIONS)}"})
        except (ValueError, TypeError, RecursionError) as error:  # of JSON, too
            self.answer(400, {"error": str(error)})
        except RequestTimeout as late:
            self.answer(503, {"error": str(late)})

    def call(self) -> object:
        length = max(0, int(self.headers.get("Content-Length", "0")))
        # Read a little more than is allowed: closing on unread bytes is a reset, which would take the answer with it.
        body = self.rfile.read(min(length, 64 * MAX_BODY))
        function = FUNCTIONS[self.path]
        if length > MAX_BODY:
            raise ValueError(f"at most {MAX_BODY} bytes")
        arguments = json.loads(body or b"[]")
        if not isinstance(arguments, list):
            raise ValueError("the body must be a list of arguments")
        return function(*arguments)

    def answer(self, status: int, what: dict[str, object]) -> None:
        body = json.dumps(what).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No access log."""


class ComputeServer(PreforkMixIn, HTTPServer):
    request_timeout = 10.0  # workers: as many as there are processors


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9009
    with ComputeServer(("127.0.0.1", port), Calls) as server:
        server.serve_forever()
