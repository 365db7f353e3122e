"""A disk outlives the process that serves it."""
