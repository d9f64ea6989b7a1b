"""Which checkpoints are kept."""

from collections.abc import Mapping, Sequence


def outdated(
    steps: Sequence[int],
    losses: Mapping[int, float],
    last: int,
    every: int | None = None,
    best: int = 0,
) -> list[int]:
    """Steps whose checkpoints go, of all that there are.

    The `last` ones stay, those of steps that `every` divides, and the `best` ones by the
    validation losses that are known.
    """
    keep = set(sorted(steps)[-last:])
    if every is not None:
        keep |= {step for step in steps if step % every == 0}
    ranked = sorted((loss, step) for step, loss in losses.items() if step in steps)
    keep |= {step for _, step in ranked[:best]}
    return [step for step in sorted(steps) if step not in keep]
