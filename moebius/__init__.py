"""Moebius: pretraining of language models that are routed over width and over depth."""
