"""Failing system calls: what a pool does when the kernel refuses something to its master.

Theory of operation. strace(1) attaches to the master alone (without -f: its children are not traced) and makes chosen
calls fail: the kernel does not carry them out, and the caller gets the error. A *cell* is one such fault: a program, a
phase of its life, a call, an error, and which of the call's occurrences in this phase fail: the first, the middle one,
the last, three in a row, or every one. A *census*, the same life without a fault, says which calls there are and how
many.

A *phase* is where the tracer is attached:

- `start`: from the first statement of the command to a pool that is ready. It may be refused, with a reason, an exit
  code, and nothing left behind.
- `serve`: workers are killed, the program is reloaded, in vain too, the pool is resized.
- `hang`: a request is past its deadline, and its worker has to be killed.
- `stop`, `drain`, `quit`: the end, from the signal on; with an idle pool, a request in progress, and no time for it.

After a phase the tracer is detached, so that the fault is over, and the pool is judged as its users would: it has its
size within 5 s, every worker answers, a killed worker is replaced, a reload serves, a request past its deadline is
ended, TERM ends it with code 0, and no process, zombie, file or descriptor is left.

`faults` is the table of calls and errors, with what is left out and why; `tracer` is strace; `life` is one run and its
verdict; `worker` is the same for the calls of a worker, which is no part of the sweep (`--workers`); `matrix` chooses
cells and prints them. `make sweep` runs all, tests/master/test_sweep.py a sample.
"""
