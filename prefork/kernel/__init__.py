"""Modules that touch the operating system, one facility each."""
