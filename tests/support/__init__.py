"""The house of the integration tests: real servers in processes of their own, real clients, and a ledger.

Nothing here imports prefork, and nothing here sleeps: whoever waits says for what and for how long (`waiting.until`).
Every process that is ended is one that a test started (its session is the mark).
"""

from . import patterns
from .clients import Address, Reply, ask, converse, dial, pids_serving, queue_up
from .control import Times, within
from .ledger import Ledger, Load, Loss, Tally, account, stop_and_start
from .processes import Process, children, descriptors, private_memory, session, state, switches, threads_of, title
from .program import PROGRAMS, Exit, Program
from .waiting import elapse, until

__all__ = [
    "PROGRAMS",
    "Address",
    "Exit",
    "Ledger",
    "Load",
    "Loss",
    "Process",
    "Program",
    "Reply",
    "Tally",
    "Times",
    "account",
    "ask",
    "children",
    "converse",
    "descriptors",
    "dial",
    "elapse",
    "patterns",
    "pids_serving",
    "private_memory",
    "queue_up",
    "session",
    "state",
    "stop_and_start",
    "switches",
    "threads_of",
    "title",
    "until",
    "within",
]
