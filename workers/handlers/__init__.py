"""The classes for handlers."""
