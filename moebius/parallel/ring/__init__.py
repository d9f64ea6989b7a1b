"""Recursion parallelism: a shared block in slices around a ring of processes."""
