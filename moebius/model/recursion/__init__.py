"""Routing over depth: which tokens enter each pass of a shared block."""
