"""The command over a program that is written for it.

A short run that must fail is a plain subprocess: its exit code and its standard error are the point. Where it
serves, it is a `Program`.
"""

from typing import Any

from . import Program
from .scripts import Start, path_of_modules

APP = """
from kit import *

VERSION = "one"

class Versioned(Handler):
    def answer(self, order):
        return VERSION if order == "version" else super().answer(order)

class Ready(prefork.PreforkTCPServer):
    workers = 3
    max_requests = 1000
    RequestHandlerClass = Versioned

    def __init__(self, address, handler=Versioned):
        super().__init__(address, handler)

class Plain(socketserver.TCPServer):
    allow_reuse_address = True

    def __init__(self, address):
        super().__init__(address, Versioned)

def make(address):
    return Ready(address)

def make_own():
    return Ready(("127.0.0.1", 0))

def make_pair():
    return [Ready(("127.0.0.1", 0)), prefork.PreforkUDPServer(("127.0.0.1", 0), Datagrams)]

def make_nothing():
    return None

def make_handler():
    return Versioned

def make_trouble():
    raise LookupError("no database")

def application(environ, start_response):
    return []

def anything(*arguments):
    return []

class Nested:
    Inside = Versioned

number = 7
"""
TCP = "tcp://127.0.0.1:0"


def command(start: Start, *arguments: object, app: str = APP, **options: Any) -> Program:
    """The command over a program in its working directory."""
    files = {"app.py": app, **options.pop("files", {})}
    return start("prefork", *arguments, files=files, env={**path_of_modules(), **options.pop("env", {})}, **options)
