"""The errors a user can cause; the command line prints them as one line and exits with a code."""


class MoebiusError(Exception):
    """An error with a message for the user and, where one is known, the way out.

    `message` names the field or file, the value found and what is allowed; `hint` says what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} - {hint}")


class ConfigError(MoebiusError):
    """The configuration cannot be read or describes something impossible."""

    exit_code = 2


class DataError(MoebiusError):
    """The corpus, the tokenizer or a token shard is missing, damaged or of another kind."""

    exit_code = 3

    def __init__(self, message: str, hint: str | None = None) -> None:
        # Names out of damaged files may hold anything.
        super().__init__(" ".join(message.splitlines()), hint)


class CheckpointError(MoebiusError):
    """A checkpoint or a run folder is missing, damaged or belongs to another run."""

    exit_code = 4


class LayoutError(MoebiusError):
    """The processes or devices at hand cannot hold the requested layout."""

    exit_code = 5


class TrainingError(MoebiusError):
    """Training cannot go on."""

    exit_code = 6


class LaunchError(MoebiusError):
    """A scheduler, or the machines that it gave, cannot run what was asked for."""

    exit_code = 7
