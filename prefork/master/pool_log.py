"""The log lines of what happened to the pool as a whole."""

import prefork.kernel.logs as logs
from prefork.rules.pool import Pool, PoolEvent

log = logs.get("prefork")


def tell(pool: Pool, event: PoolEvent, generation: int, took: float) -> None:
    """Log one event. `took`: seconds since the start of the pool."""
    if event is PoolEvent.READY:
        log.info("pool ready: %d workers, generation %d, %.3f s", pool.size, generation, took)
    elif event is PoolEvent.RELOAD_BEGINS:
        log.info("reload: generation %d begins", generation)
    elif event is PoolEvent.RELOAD_SERVES:
        log.info("reload: generation %d serves", generation)
    elif event is PoolEvent.RELOAD_FAILED:
        text = "reload failed: no worker of generation %d became ready; generation %d serves on [PF0301]"
        log.error(text, generation, pool.generation)
    elif event is PoolEvent.RELOAD_IGNORED:
        log.warning("reload ignored: the pool stops [PF0304]")
    elif event is PoolEvent.RELOAD_REMEMBERED:
        log.info("reload remembered: it follows when the reload to generation %d is over [PF0305]", generation)
    else:
        log.warning("reload given up: the pool stops before generation %d is ready [PF0308]", generation)
