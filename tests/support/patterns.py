"""Every text of the log that a test matches. What is not here is free to change its wording."""

import re

# logging.basicConfig(format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s"), and the command's own.
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,]\d{3} \S+\[\d+\] (DEBUG|INFO|WARNING|ERROR|CRITICAL): ")

LISTENING = re.compile(r": listening on ((?:tcp|udp|unix|unixgram):\S+)")
READY = re.compile(r": pool ready: (\d+) workers?, generation (\d+)")
# The groups: pid, slot, generation, and the rest of the line with the code.
LEFT = re.compile(r": worker (\d+) \(slot (\d+), generation (\d+)\) exited: (.*)")
RELOAD_BEGINS = re.compile(r": reload: generation (\d+) begins")
RELOADED = re.compile(r": reload: generation (\d+) serves")
RELOAD_FAILED = re.compile(r": reload failed: .*")
WANTED = re.compile(r": resize: the pool is to have (\d+) workers")
STOPPING = re.compile(r": stopping\b")
STOPPED = re.compile(r": stopped\b")

DROPPED = re.compile(r"\d+ messages? (?:was|were) dropped")

# The title of a worker that serves, as ps shows it.
TITLE_READY = re.compile(r"prefork: worker \d+\b.*\bready\b")

# For the allow-lists of `finish`.
TRACEBACK = (
    r"Traceback \(most recent call last\):|  File .*|    .*|\S*(Error|Exception|Exit|Interrupt|Timeout)\b.*"
    r"|During handling of|The above exception|"
)
ANYTHING = r".*"
# socketserver's own BaseServer.handle_error, and what faulthandler writes.
HANDLER_ERROR = r"-{40}|Exception occurred during processing of request from .*|" + TRACEBACK
FAULT = (
    r"Fatal Python error: .*|Current thread.*|Thread .*|  File .*|Timeout .*|Extension modules: .*|  <.*>|\s*\.\.\.|"
    r"  Binary file .*|"  # of the C stack, from Python 3.14 on
)
