"""Placing a Program on many processes. One process is all there is today."""
