"""The classes with an event loop."""
