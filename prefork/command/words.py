"""The first words of a command line that see and steer a running pool, each with its help.

They are a module of their own so that a master, which reads them as it starts, imports nothing else of the client.
"""

COMMANDS = {
    "status": "show the pool and its workers",
    "explain": "say why workers exited, and what the master does next",
    "reload": "replace the workers by a new generation",
    "stop": "stop the pool gracefully",
    "scale": "change the number of workers",
    "recycle": "replace the worker of one slot",
    "ps": "list the pools of this user",
}
