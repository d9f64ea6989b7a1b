"""The decision to go back to a checkpoint."""


class Rewind(Exception):  # noqa: N818 - it is not an error
    """Raised by all processes at the same point of the loop: go back, leave the samples in between
    out, and go on."""
