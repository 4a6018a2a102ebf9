"""Judging: tasks, scorers, probes, statistics and the report; usable on its own with any object that answers."""
