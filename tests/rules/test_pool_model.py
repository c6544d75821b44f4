"""The pool and its stop against a fake kernel and clock: whatever happens, in whatever order, their rules hold.

Two drivers share the `World`: hypothesis, which shrinks what it finds, and a random walk, which goes far.
`PREFORK_MODEL_STEPS=5000000` and `PREFORK_MODEL_EXAMPLES=5000` go further, `PREFORK_MODEL_SEED=2` elsewhere; a failure
names the episode and its last events.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from prefork.rules.states import State
from prefork.rules.worker_exit import Reason
from rules.world import LEAVING, PROMPT, SIGNALS, Fate, World, options_of

STEPS = int(os.environ.get("PREFORK_MODEL_STEPS", "100000"))
SEED = os.environ.get("PREFORK_MODEL_SEED", "1")
pytestmark = pytest.mark.timeout(180 + STEPS / 500)
EPISODE = 150  # steps after which a walk converges or stops, and the next begins


# -- driven by hypothesis ----------------------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """Rules that name a worker count from the oldest process; a few more name one that is gone or never was."""

    world: World

    @initialize(seed=st.integers(0, 2**16), deaf=st.sampled_from((0.0, 0.5)))
    def begin(self, seed: int, deaf: float) -> None:
        self.world = World(seed, **options_of(random.Random(seed)))
        self.world.deaf = deaf

    def pid(self, which: int) -> int:
        pids = list(self.world.processes)
        return pids[which] if which < len(pids) else self.world.last_pid - which + 12

    def done(self, look: bool) -> None:
        if look:
            self.world.look()

    which = st.integers(0, 12)
    look = st.sampled_from((True, True, True, False))

    @rule(seconds=st.sampled_from((0.001, 0.02, 0.1, 0.3, 1.0, 3.0, 12.0, 1000.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.world.look()

    @rule()
    def sleep(self) -> None:
        self.world.sleep()
        self.world.look()

    @rule(seconds=st.sampled_from((0.6, 10.0)), look=look)
    def suspend(self, seconds: float, look: bool) -> None:
        self.world.suspend(seconds)
        self.done(look)

    @rule(forks=st.lists(st.booleans(), max_size=4))
    def forks_are_refused(self, forks: list[bool]) -> None:
        self.world.refuse(forks)

    @rule(which=which, look=look)
    def ready_byte(self, which: int, look: bool) -> None:
        self.world.boot(self.pid(which))
        self.done(look)

    @rule()
    def all_boot(self) -> None:
        for pid in list(self.world.processes):
            self.world.boot(pid)
        self.world.look()

    @rule(which=which, look=look)
    def acknowledged(self, which: int, look: bool) -> None:
        self.world.understand(self.pid(which))
        self.done(look)

    @rule(which=which, reason=st.sampled_from(LEAVING), look=look)
    def leaves(self, which: int, reason: Reason, look: bool) -> None:
        self.world.leave(self.pid(which), reason)
        self.done(look)

    @rule(which=which, look=look)
    def wears_out(self, which: int, look: bool) -> None:
        self.world.wear(self.pid(which))
        self.done(look)

    @rule(which=which, look=look)
    def hangs(self, which: int, look: bool) -> None:
        self.world.condemn(self.pid(which))
        self.done(look)

    @precondition(lambda self: self.world.processes)
    @rule(which=which, crashed=st.booleans(), served=st.booleans(), look=look)
    def exits(self, which: int, crashed: bool, served: bool, look: bool) -> None:
        pids = list(self.world.processes)
        self.world.exit(pids[which % len(pids)], crashed, served)
        self.done(look)

    @rule(size=st.integers(-1, 6), look=look)
    def resize(self, size: int, look: bool) -> None:
        self.world.resize(size)
        self.done(look)

    @rule(look=look)
    def reload(self, look: bool) -> None:
        self.world.reload()
        self.done(look)

    @rule(signal=st.sampled_from(SIGNALS), really=st.integers(0, 9), look=look)
    def stop(self, signal: str, really: int, look: bool) -> None:
        if really == 0 or self.world.sequence.begun:
            self.world.signal(signal)
        self.done(look)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=int(os.environ.get("PREFORK_MODEL_EXAMPLES", "60")),
    stateful_step_count=60,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# -- driven at random --------------------------------------------------------------------------------------------------


def step(world: World, pick: random.Random, calm: float) -> None:
    """One event: what a sound pool sees with the share `calm`, otherwise anything at all."""
    pids = list(world.processes)
    # A message may be late: its sender gone, or (in a hostile one) never there.
    pid = pick.choice(pids) if pids and pick.random() < 0.95 else world.last_pid - pick.randint(-3, 20)
    kind = pick.random()
    if pick.random() < calm:
        member = world.pool.members.get(pid)
        if member is None or kind < 0.3:
            event: tuple[object, ...] = (world.sleep,)
        elif member.state is State.RETIRING:
            event = (world.understand, pid) if kind < 0.6 else (world.exit, pid, False, False)
        elif member.state is State.STARTING:
            event = (world.boot, pid)
        else:
            event = (world.wear, pid) if kind < 0.4 else (world.pass_time, pick.random())
    elif kind < 0.2:
        event = (world.pass_time, pick.choice((0.001, 0.02, 0.1, 0.3, 1.0, 3.0, 12.0)) * pick.random())
    elif kind < 0.3:
        event = (world.boot, pid)
    elif kind < 0.55 and pids:
        event = (world.exit, pick.choice(pids), pick.random() < 0.5, pick.random() < 0.3)
    elif kind < 0.63:
        event = (world.leave, pid, pick.choice(LEAVING))
    elif kind < 0.69:
        event = (world.wear, pid)
    elif kind < 0.75:
        event = (world.understand, pid)
    elif kind < 0.81:
        event = (world.condemn, pid)
    elif kind < 0.87:
        event = (world.resize, pick.randint(-1, 6))
    elif kind < 0.93:
        event = (world.reload,)
    elif kind < 0.95:
        event = (world.refuse, [pick.random() < 0.7 for _ in range(pick.randint(1, 6))])
    elif kind < 0.97:
        event = (world.suspend, pick.choice((0.6, 5.0)))
    elif kind < 0.98:
        event = (world.signal, pick.choice(SIGNALS))
    else:
        event = (world.pass_time, 1000.0)
    act, *arguments = event
    world.trace.append((round(world.now, 4), getattr(act, "__name__", act), *arguments))
    assert callable(act)
    act(*arguments)
    if pick.random() < 0.8:
        world.look()


def walk(steps: int, name: str) -> None:
    """Episodes of random events until there were so many; `name` tells this walk's dice from those of another."""
    for episode in range(max(1, steps // EPISODE)):
        seed = f"{name}:{episode}"
        pick = random.Random(seed)
        world = World(seed, **options_of(pick))
        world.deaf = pick.choice((0.0, 0.2, 1.0))
        calm = pick.choice((0.2, 0.6, 0.9))
        try:
            world.look()
            for _ in range(EPISODE):
                step(world, pick, calm)
            world.finish()
        except BaseException as error:
            error.add_note(f"episode {seed}, {world.options.__dict__}\n" + "\n".join(map(str, world.trace)))
            raise


def test_random_walk() -> None:
    """Through STEPS events of every kind no rule is broken, and after each episode the pool converges or stops."""
    walk(STEPS, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_events() -> None:
    """The same through a million events, of other dice."""
    walk(1_000_000, f"soak {SEED}")


# -- at length ---------------------------------------------------------------------------------------------------------


def booted(fate: Fate, **values: float) -> World:
    """A settled pool whose processes will meet `fate` from now on."""
    world = World(fate=lambda generation: (PROMPT, None), **values)
    assert world.run(10.0, lambda: world.settled)
    world.fate = fate
    world.spawns.clear()
    return world


@pytest.mark.parametrize(
    "fate",
    [(None, 0.0), (None, 0.5), (0.001, 0.002), (0.1, 0.9), (None, None)],
    ids=["at once", "in its boot", "once ready", "soon after", "hangs"],
)
@pytest.mark.parametrize("size", [1, 3])
def test_crash_loop(size: int, fate: tuple[float | None, float | None]) -> None:
    """A program that crashes or hangs whenever it is started costs at most about one boot a second a slot."""
    world = booted(lambda generation: fate, workers=size, boot_timeout=0.05 if fate == (None, None) else 5.0)
    for process in world.processes.values():
        process.dies_at = world.now
    world.run(600.0)
    assert max(world.spawns.values()) <= 600
    assert sum(world.spawns.values()) <= 600 * size
    world.finish()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("lost", [1, 4])
def test_reload_mends_a_crash_loop(size: int, lost: int) -> None:
    """While some or all of the old generation crash-loop, a reload is tried nevertheless, and mends it."""
    world = booted(lambda generation: (None, 0.01) if generation == 1 else (PROMPT, None), workers=size)
    for process in list(world.processes.values())[:lost]:
        process.dies_at = world.now
    world.run(60.0)
    world.reload()
    assert world.run(2.0, lambda: world.settled)
    assert world.pool.generation == 2


@pytest.mark.parametrize("size", [1, 4])
def test_losses_during_a_hanging_reload(size: int) -> None:
    """While the next generation hangs in its boot, the lost workers of the last good one are replaced at once."""
    world = booted(lambda generation: (PROMPT, None) if generation == 1 else (None, None), workers=size)
    world.reload()
    world.run(1.0)
    for pid in [m.pid for m in world.pool.ready]:
        world.exit(pid, crashed=False, served=False)
    assert world.run(2 * PROMPT, lambda: len(world.pool.ready) == size)
    assert world.pool.generation == 1 and world.pool.candidate == 2
    assert world.run(10.0, lambda: world.settled)
    assert world.pool.generation == 1


def test_recycling_for_a_long_time() -> None:
    """Workers that live for a minute are replaced one by one for an hour, and never are fewer than the size ready."""
    world = booted(lambda generation: (PROMPT, None), workers=4, max_lifetime=60.0)
    assert not world.run(3600.0, lambda: len(world.pool.ready) < 4)
    assert 4 * 58 <= sum(world.spawns.values()) <= 4 * 68
