"""Generating one token after another with what earlier tokens have left behind."""
