"""Runs that a command would make, their costs, and what is wrong, before anything runs."""
