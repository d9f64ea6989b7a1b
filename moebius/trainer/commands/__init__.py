"""The subcommands of `moebius`, one file each: `add_arguments(parser)` and `run(arguments, console)`."""
