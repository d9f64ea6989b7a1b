"""What all processes decide alike, at the same point of the training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


class Consensus:
    """Questions that any process may answer; the largest answer is everyone's.

    One small reduction on the host for all questions together; the device is not waited for.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self.votes = dict.fromkeys(sorted(questions), 0)
        self.agreed = dict(self.votes)
        """the answers of the last decision"""

    def vote(self, question: str, answer: int) -> None:
        """Answer a question of the coming decision; without an answer it is 0.

        A larger answer takes the place of a smaller one.
        """
        self.votes[question] = max(self.votes[question], answer)

    def decide(self) -> dict[str, int]:
        """The largest of everyone's answers; a collective call."""
        answers = torch.tensor(list(self.votes.values()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(answers, dist.ReduceOp.MAX)
        self.agreed = dict(zip(self.votes, answers.tolist(), strict=True))
        self.votes = dict.fromkeys(self.votes, 0)
        return self.agreed
