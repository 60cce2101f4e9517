"""Counting of a process that Python starts anew (see `helpers.killed`)."""

from helpers.counting import install_from_environment

install_from_environment()
