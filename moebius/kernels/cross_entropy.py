"""The output head and its losses in chunks of tokens: logits are never held for more than a chunk.

Shapes: X exits, T tokens, C tokens of a chunk, D hidden, V vocabulary, or the part of it that is
here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels.precision import for_products
from moebius.kernels.vocabulary import Vocabulary, label_losses_, locate, log_softmax_, total

CHUNK_BYTES = 64 * 2**20
"""what the fp32 logits of a chunk may take unless `chunk_tokens` says otherwise"""


@dataclass(frozen=True)
class Teacher:
    """Whose distribution over the vocabulary the exits are drawn to; it gets no gradient."""

    hidden_TD: Tensor
    """final hidden states of another model, or of a later exit; their width may differ"""
    weight_VD: Tensor
    """the head that reads them, over the same part of the same vocabulary"""
    temperature: float = 1.0
    """divides the logits of both sides"""


@dataclass(frozen=True)
class ExitLosses:
    """Losses of all exits in nats; fp32, or fp64 for inputs in fp64."""

    total: Tensor
    """scalar: the weighted sum; it alone can be differentiated"""
    ce_X: Tensor
    """cross-entropy of each exit, summed over tokens"""
    kl_X: Tensor
    """divergence from the teacher, summed over tokens; zeros without one"""


class RowLosses(Protocol):
    """Reads the logits of a chunk as the product left them, each row on its own."""

    def __call__(self, logits_CV: Tensor, labels_C1: Tensor, with_gradients: bool) -> Tensor:
        """Cross-entropy of each token, `[C]` in nats, in fp32 or for logits in fp64 in that.

        Leaves in `logits`, which are contiguous, its gradient by them (softmax, less 1 at the
        label) if there are to be gradients, and else anything.
        """


def linear_cross_entropy(
    hidden_XTD: Sequence[Tensor],
    weight_VD: Tensor,
    labels_T: Tensor,
    ce_coefficients: Sequence[float],
    kl_coefficients: Sequence[float] | None = None,
    teacher: Teacher | None = None,
    chunk_tokens: int | None = None,
    vocabulary: Vocabulary | None = None,
    row_losses: RowLosses | None = None,
) -> ExitLosses:
    """`sum_x ce[x] * CE_x + kl[x] * KL_x` over exits that share a head; sums over tokens.

    `CE_x = sum_t -log softmax(z)[label]` with `z = hidden @ weight.T`, and the forward divergence
    `KL_x = tau**2 * sum_t KL(softmax(teacher / tau) || softmax(z / tau))` (Hinton et al. 2015,
    arXiv 1503.02531; the square keeps its gradient as large as that of CE at every tau).

    The gradients are made in the forward pass, chunk by chunk, and backward only scales them:
    nothing is computed twice. FLOPs of both: `6 * T * D * V` per exit, of which 2 for the gradient
    of its hidden states and 2 for that of the weight are saved where none is required, and
    `2 * T * Dt * V` for a teacher. Bytes in fp32: `4 * C * V` for logits, `12 * C * V` with a
    teacher, for any number of exits; products in b < 4 bytes add `b * (C + 2 * D) * V`, and `b * (C
    + Dt) * V` for the teacher's. The gradients take as much as what they belong to, twice as much
    during backward.

    With a `vocabulary` the head is a part of it and sums over v go over all parts: three for each
    chunk and exit, and with a teacher three for each chunk and one (at another temperature than 1
    three) for each exit; losses are the whole ones everywhere, gradients those by what is here, so
    that of the hidden states lacks the other parts'.

    `row_losses` stands for a chain of operations, each of which passes over the logits of a chunk;
    with a teacher or a `vocabulary` it is not used. It needs no second copy of them: `b * C * V`
    bytes for logits, with products in b bytes.

    Under autocast the products run in its dtype, those of the gradients too, else in the inputs';
    losses are summed up in fp32, the weight's gradient in the weight's dtype. There are no second
    derivatives. Raises ValueError for other than X coefficients, T labels or T tokens of the
    teacher, a teacher without `kl_coefficients` or the reverse, and chunks of no token; a label
    outside of the vocabulary raises what `gather` raises, no value of it means to ignore a token.
    """
    kl = (0.0,) * len(hidden_XTD) if kl_coefficients is None else tuple(kl_coefficients)
    counts = (len(hidden_XTD), len(ce_coefficients), len(kl))
    if len(set(counts)) > 1:
        raise ValueError(f"{counts[0]} exits, but {counts[1]} and {counts[2]} coefficients")
    if (teacher is None) != (kl_coefficients is None):
        raise ValueError("a teacher and kl_coefficients are given together or not at all")
    _check_tokens(labels_T, *hidden_XTD, *([] if teacher is None else [teacher.hidden_TD]))
    whole = teacher is None and vocabulary is None
    request = _Request(
        ce=tuple(ce_coefficients),
        kl=kl,
        teacher=teacher,
        vocabulary=vocabulary,
        chunk_tokens=_chunk_tokens(len(labels_T), len(weight_VD), chunk_tokens),
        with_gradients=torch.is_grad_enabled(),
        row_losses=row_losses if whole else None,
    )
    losses: tuple[Tensor, Tensor, Tensor] = _ExitLossFunction.apply(  # type: ignore[no-untyped-call]
        request, weight_VD, labels_T, *hidden_XTD
    )
    return ExitLosses(*losses)


@torch.no_grad()
def token_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk_tokens: int | None = None,
    vocabulary: Vocabulary | None = None,
    row_losses: RowLosses | None = None,
) -> Tensor:
    """`-log softmax(hidden @ weight.T)[label]` of each token in nats, `[T]`, without a gradient.

    FLOPs: `2 * T * D * V`; dtypes, bytes, `row_losses` and errors as in `linear_cross_entropy`.
    """
    _check_tokens(labels_T, hidden_TD)
    row_losses = row_losses if vocabulary is None else None
    chunk_tokens = _chunk_tokens(len(labels_T), len(weight_VD), chunk_tokens)
    head = _Head(weight_VD, chunk_tokens, with_copy=row_losses is None)
    losses_T = weight_VD.new_empty(labels_T.shape, dtype=head.loss_dtype)
    for start in range(0, len(labels_T), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        hidden_CD, labels_C1 = for_products(hidden_TD[rows]), labels_T[rows].unsqueeze(1)
        if row_losses is not None:
            losses_T[rows] = row_losses(head.product(hidden_CD), labels_C1, with_gradients=False)
        else:
            losses_T[rows] = label_losses_(head.logits(hidden_CD), labels_C1, vocabulary)
    return losses_T


@dataclass(frozen=True)
class _Request:
    """What to compute from the tensors."""

    ce: tuple[float, ...]
    kl: tuple[float, ...]
    teacher: Teacher | None
    vocabulary: Vocabulary | None
    chunk_tokens: int
    with_gradients: bool
    """grad mode of the caller; inside of a Function it is always off"""
    row_losses: RowLosses | None
    """none with a teacher or a vocabulary in parts"""


class _ExitLossFunction(torch.autograd.Function):
    """Losses, and gradients of their weighted sum that backward multiplies by what comes in."""

    @staticmethod
    def forward(
        ctx: Any,
        request: _Request,
        weight_VD: Tensor,
        labels_T: Tensor,
        *hidden_XTD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients(weight_VD, hidden_XTD, request.with_gradients)
        ce_X, kl_X = _exit_losses(request, weight_VD, labels_T, hidden_XTD, gradients)
        total = ce_X.new_zeros(())
        for x, (ce, kl) in enumerate(zip(request.ce, request.kl, strict=True)):
            total = total + ce * ce_X[x] + kl * kl_X[x]
        ctx.save_for_backward(gradients.weight_VD, *gradients.hidden_XTD)
        ctx.mark_non_differentiable(ce_X, kl_X)
        return total, ce_X, kl_X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: with `retain_graph` it may run again.
        weight, *hidden = (None if g is None else g * upstream for g in ctx.saved_tensors)
        return None, weight, None, *hidden


def _exit_losses(
    request: _Request,
    weight_VD: Tensor,
    labels_T: Tensor,
    hidden_XTD: Sequence[Tensor],
    gradients: "_Gradients",
) -> tuple[Tensor, Tensor]:
    """`(ce_X, kl_X)`; fills the gradients on the way."""
    head = _Head(weight_VD, request.chunk_tokens, with_copy=request.row_losses is None)
    lesson, vocabulary = None, request.vocabulary
    if request.teacher is not None:
        lesson = _Lesson(request.teacher, request.chunk_tokens, vocabulary)
    ce_XT = weight_VD.new_zeros(len(hidden_XTD), len(labels_T), dtype=head.loss_dtype)
    kl_XT = torch.zeros_like(ce_XT)
    for start in range(0, len(labels_T), request.chunk_tokens):
        rows = slice(start, start + request.chunk_tokens)
        labels_C1 = labels_T[rows].unsqueeze(1)
        if lesson is not None:
            lesson.go_to(rows)
        for x, hidden_TD in enumerate(hidden_XTD):
            hidden_CD = for_products(hidden_TD[rows])
            if request.row_losses is not None:
                wanted, logits_CV = gradients.wanted(x), head.product(hidden_CD)
                ce_XT[x, rows] = request.row_losses(logits_CV, labels_C1, with_gradients=wanted)
                if wanted:
                    gradients.add(x, rows, logits_CV, hidden_CD, head, request.ce[x])
                continue
            logits_CV = head.logits(hidden_CD)
            ce_XT[x, rows] = label_losses_(logits_CV, labels_C1, vocabulary)
            if lesson is not None:
                kl_XT[x, rows] = lesson.losses(logits_CV)
            if gradients.wanted(x):
                scale = _logit_gradients_(logits_CV, labels_C1, request, x, lesson)
                gradients.add(x, rows, head.for_products(logits_CV), hidden_CD, head, scale)
    return ce_XT.sum(1), kl_XT.sum(1)


class _Head:
    """A head with room for the logits of a chunk, which every chunk and exit uses again.

    One buffer instead of a new one each time: the peak does not depend on when tensors are freed,
    and on a CPU fresh pages cost several times a pass over them.
    """

    def __init__(self, weight_VD: Tensor, chunk_tokens: int, with_copy: bool = True) -> None:
        self.weight_VD = for_products(weight_VD)
        dtype = self.weight_VD.dtype
        self.loss_dtype = torch.promote_types(dtype, torch.float32)
        self.product_CV = weight_VD.new_empty(chunk_tokens, len(weight_VD), dtype=dtype)
        self.logits_CV = self.product_CV
        """in the dtype of losses: the same memory unless products run in low precision"""
        if with_copy and dtype != self.loss_dtype:
            self.logits_CV = torch.empty_like(self.product_CV, dtype=self.loss_dtype)

    def product(self, hidden_CD: Tensor) -> Tensor:
        """`hidden @ weight.T` in the dtype of products, in the buffer."""
        product_CV = self.product_CV[: len(hidden_CD)]
        return torch.mm(hidden_CD, self.weight_VD.T, out=product_CV)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """The same in the dtype of losses."""
        product_CV = self.product(hidden_CD)
        if self.logits_CV is self.product_CV:
            return product_CV
        return self.logits_CV[: len(hidden_CD)].copy_(product_CV)

    def for_products(self, logits_CV: Tensor) -> Tensor:
        """The contents of the buffer in the dtype of products."""
        if self.logits_CV is self.product_CV:
            return logits_CV
        return self.product_CV[: len(logits_CV)].copy_(logits_CV)


class _Lesson:
    """A teacher's distribution over the vocabulary for the tokens of a chunk."""

    def __init__(self, teacher: Teacher, chunk_tokens: int, vocabulary: Vocabulary | None) -> None:
        self.vocabulary = vocabulary
        self.hidden_TD = teacher.hidden_TD
        self.head = _Head(teacher.weight_VD, chunk_tokens)
        self.temperature = teacher.temperature
        self.probs_CV = torch.empty_like(self.head.logits_CV)
        self.entropy_C = self.probs_CV.new_empty(0)

    def go_to(self, rows: slice) -> None:
        """Let the teacher speak on these tokens."""
        logits_CV = self.head.logits(for_products(self.hidden_TD[rows]))
        log_probs_CV, _ = log_softmax_(logits_CV.div_(self.temperature), self.vocabulary)
        probs_CV = torch.exp(log_probs_CV, out=self.probs_CV[: len(logits_CV)])
        self.entropy_C = -total(log_probs_CV.mul_(probs_CV).sum(1), self.vocabulary)

    def losses(self, log_probs_CV: Tensor) -> Tensor:
        """`tau**2 * KL(teacher || student)` of each token; the student's is at temperature 1.

        Leaves the student's log-probabilities at temperature tau in `spare`, unless that is 1.
        """
        tau, spare_CV = self.temperature, self._spare(log_probs_CV)
        # log q = log_probs / tau - log_sum, so that sum_v p log q needs no third buffer.
        torch.mul(log_probs_CV, self.probs_CV[: len(log_probs_CV)], out=spare_CV)
        cross_C = -total(spare_CV.sum(1), self.vocabulary) / tau
        if tau == 1:
            return cross_C - self.entropy_C
        torch.div(log_probs_CV, tau, out=spare_CV)
        _, log_sum_C = log_softmax_(spare_CV, self.vocabulary)
        return tau**2 * (cross_C + log_sum_C - self.entropy_C)

    def add_gradients_(self, gradients_CV: Tensor, share: float) -> None:
        """Add `share * (q - p)`, of which q is there already at a temperature of 1.

        Follows `losses` on the same tokens, whose result in `spare` it uses up.
        """
        if self.temperature != 1:
            gradients_CV.add_(self._spare(gradients_CV).exp_(), alpha=share)
        gradients_CV.sub_(self.probs_CV[: len(gradients_CV)], alpha=share)

    def _spare(self, like_CV: Tensor) -> Tensor:
        """The teacher's logits are no longer needed once there are probabilities."""
        return self.head.logits_CV[: len(like_CV)]


class _Gradients:
    """Gradients of the weighted sum of losses for the tensors that require one."""

    def __init__(
        self, weight_VD: Tensor, hidden_XTD: Sequence[Tensor], with_gradients: bool
    ) -> None:
        self.weight_VD, *self.hidden_XTD = (
            torch.zeros_like(t) if with_gradients and t.requires_grad else None
            for t in (weight_VD, *hidden_XTD)
        )

    def wanted(self, x: int) -> bool:
        """Whether anything needs the gradient of this exit's logits."""
        return self.weight_VD is not None or self.hidden_XTD[x] is not None

    def add(
        self, x: int, rows: slice, logits_CV: Tensor, hidden_CD: Tensor, head: _Head, scale: float
    ) -> None:
        """Pass on `scale` times the gradient `logits` of an exit's logits of some tokens."""
        hidden_TD = self.hidden_XTD[x]
        if hidden_TD is not None:
            hidden_TD[rows] = torch.mm(logits_CV, head.weight_VD)
            hidden_TD[rows].mul_(scale)
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == logits_CV.dtype:
            # Not `addmm_`, whose FLOPs FlopCounterMode does not count.
            sum_VD = self.weight_VD
            torch.addmm(sum_VD, logits_CV.T, hidden_CD, alpha=scale, out=sum_VD)
        else:
            self.weight_VD.add_(torch.mm(logits_CV.T, hidden_CD), alpha=scale)


def _logit_gradients_(
    log_probs_CV: Tensor, labels_C1: Tensor, request: _Request, x: int, lesson: _Lesson | None
) -> float:
    """Turn log-probabilities into the gradient of `ce * CE + kl * KL` by the logits, in place.

    It still lacks the factor that is returned: coefficients are about 1 over the tokens of a step,
    which would push the small entries below what fp16 can hold; and mostly it saves a pass.
    """
    ce, kl = request.ce[x], request.kl[x]
    tau = 1.0 if lesson is None else lesson.temperature
    scale = abs(ce) + abs(kl) * tau or 1.0
    share = (ce + kl if tau == 1 else ce) / scale
    gradients_CV = log_probs_CV.exp_()
    if share != 1:
        gradients_CV.mul_(share)
    if lesson is not None and kl:
        lesson.add_gradients_(gradients_CV, kl * tau / scale)
    row_C1, is_here_C1 = locate(labels_C1, request.vocabulary, gradients_CV.shape[1])
    one_hot_C1 = is_here_C1.to(gradients_CV.dtype) * (-ce / scale)
    gradients_CV.scatter_add_(1, row_C1, one_hot_C1)
    return scale


def _check_tokens(labels_T: Tensor, *hidden: Tensor) -> None:
    """Raise ValueError unless there is a label for each token: slices would hide it."""
    for hidden_TD in hidden:
        if len(hidden_TD) != len(labels_T):
            raise ValueError(f"{len(hidden_TD)} tokens, but {len(labels_T)} labels")


def _chunk_tokens(tokens: int, vocabulary: int, requested: int | None) -> int:
    """Tokens of a chunk: as few chunks as `CHUNK_BYTES` allows, and all about as large."""
    if requested is not None:
        if requested < 1:
            raise ValueError(f"chunk_tokens is {requested}, must be at least 1")
        return min(requested, max(tokens, 1))
    most = max(CHUNK_BYTES // (4 * vocabulary), 1)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)
