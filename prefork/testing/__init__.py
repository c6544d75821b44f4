"""What tests of a program use: a pool of their own, `pool()`, and the pytest fixture `prefork_pool`."""

import contextlib

from prefork.testing.pools import Pool, pool

__all__ = ["Pool", "pool"]

with contextlib.suppress(ImportError):  # only under pytest
    from prefork.testing.pools import prefork_pool, pytest_runtest_makereport

    __all__ += ["prefork_pool", "pytest_runtest_makereport"]
