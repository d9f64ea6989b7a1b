"""Checkpoints from which a run has crashed again and again at the same place."""

from pathlib import Path

from moebius.trainer.recovery.goodput import FILE_NAME, read_accounts


def crashed(folder: Path, step: int) -> int:
    """How often a run that was started from a checkpoint has crashed at the furthest step that it
    has ever reported.

    Crashes at other steps, as those of killed processes are, do not tell against a checkpoint.
    """
    attempts = read_accounts(folder / FILE_NAME)
    furthest = max((attempt.accounts[-1].step for attempt in attempts), default=0)
    return sum(
        attempt.accounts[0].step == step
        and attempt.accounts[-1].step == furthest
        and not attempt.ended
        for attempt in attempts
    )
