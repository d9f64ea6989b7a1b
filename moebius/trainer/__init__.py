"""The run: configuration, command line, loop, callbacks, checkpoints. All side effects are here."""
