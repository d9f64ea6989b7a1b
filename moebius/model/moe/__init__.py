"""Routing over width: a pipeline from scores to the weighted outputs of chosen experts."""
