"""Checkpoints: verified, atomic, and free of anything that could run code when loaded."""
