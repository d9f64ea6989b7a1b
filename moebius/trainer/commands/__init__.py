"""The subcommands of `moebius`: a file each, with `add_arguments` and `run`."""
