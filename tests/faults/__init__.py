"""Faults, many of each: damage, kills, full disks, two processes. ``python -m tests.faults``."""
