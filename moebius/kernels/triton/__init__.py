"""Triton sources, one file per operation; only what chooses a backend imports them."""
