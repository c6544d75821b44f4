"""What tests of users use."""

from prefork.testing.pools import *
