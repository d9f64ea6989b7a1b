"""The chunked head against whole logits: values, gradients, FLOPs, and what is held at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import TensorWeakRef

from moebius.kernels import cross_entropy as kernel
from moebius.kernels.cross_entropy import Teacher, linear_cross_entropy, token_cross_entropy

T, D, V = 13, 6, 17
TEACHER_WIDTH = 5
CE = (1.0, 0.25, 0.5)
KL = (0.5, 2.0, 0.0)
CHUNKS = [1, 5, 12, 13, 50, None]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def inputs_of(
    exits: int, dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int] = (T, D, V)
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states of the exits, the weight (both with gradients) and labels."""
    tokens, width, vocabulary = sizes
    generator = torch.Generator().manual_seed(exits)
    hidden = [torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(exits)]
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return [h.requires_grad_() for h in hidden], weight.requires_grad_(), labels


def teacher_of(
    temperature: float,
    dtype: torch.dtype = torch.float64,
    tokens: int = T,
    vocabulary: int = V,
    device: str = "cpu",
) -> Teacher:
    """A model of another width, whose tensors require gradients that it must not get."""
    generator = torch.Generator().manual_seed(99)
    hidden, weight = (
        torch.randn(rows, TEACHER_WIDTH, generator=generator).to(device, dtype).requires_grad_()
        for rows in (tokens, vocabulary)
    )
    return Teacher(hidden, weight, temperature)


def naive(
    hidden_XTD: Sequence[Tensor],
    weight_VD: Tensor,
    labels_T: Tensor,
    ce: Sequence[float],
    kl: Sequence[float] | None = None,
    teacher: Teacher | None = None,
) -> kernel.ExitLosses:
    """The definition, with all logits at once, left to autograd."""
    total, ce_X, kl_X = torch.zeros(()), [], []
    for x, hidden in enumerate(hidden_XTD):
        logits = F.linear(hidden, weight_VD)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ce_X.append(F.cross_entropy(logits, labels_T, reduction="sum"))
        kl_X.append(torch.zeros_like(ce_X[-1]))
        if teacher is not None:
            theirs = F.linear(teacher.hidden_TD.detach(), teacher.weight_VD.detach())
            ours, theirs = (
                (z.to(logits.dtype) / teacher.temperature).log_softmax(-1) for z in (logits, theirs)
            )
            divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
            kl_X[-1] = teacher.temperature**2 * divergence
        total = total + ce[x] * ce_X[x] + (0.0 if kl is None else kl[x]) * kl_X[x]
    return kernel.ExitLosses(total, torch.stack(ce_X).detach(), torch.stack(kl_X).detach())


def close(got: Sequence[Tensor], expected: Sequence[Tensor], relative: float = 1e-10) -> None:
    """Tensor by tensor, up to `relative` of the largest entry (of 1, if all are smaller)."""
    for ours, theirs in zip(got, expected, strict=True):
        bound = relative * max(float(theirs.detach().abs().max()), 1.0)
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=bound)


def gradients_close(
    got: Tensor, expected: Tensor, inputs: Sequence[Tensor], relative: float = 1e-10
) -> None:
    """The same gradients, in the dtypes of their tensors, and again when asked again."""
    exact = torch.autograd.grad(expected, inputs, retain_graph=True)
    for _ in range(2):
        grads = torch.autograd.grad(got, inputs, retain_graph=True)
        assert [g.dtype for g in grads] == [t.dtype for t in inputs]
        close(grads, exact, relative)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_equals_whole_logits(
    chunk_tokens: int | None, exits: int, temperature: float | None, device: str
) -> None:
    """Values and all gradients in fp64, with a factor from upstream."""
    hidden, weight, labels = inputs_of(exits)
    hidden = [h.detach().to(device).requires_grad_() for h in hidden]
    weight, labels = weight.detach().to(device).requires_grad_(), labels.to(device)
    teacher, kl = None, None
    if temperature is not None:
        teacher, kl = teacher_of(temperature, device=device), KL[:exits]
    got = linear_cross_entropy(hidden, weight, labels, CE[:exits], kl, teacher, chunk_tokens)
    expected = naive(hidden, weight, labels, CE[:exits], kl, teacher)
    close(tuple(vars(got).values()), tuple(vars(expected).values()))
    assert not got.ce_X.requires_grad
    assert not got.kl_X.requires_grad
    gradients_close(0.37 * got.total, 0.37 * expected.total, [*hidden, weight])


@pytest.mark.parametrize(("ce", "kl"), [((0.0,), (1.0,)), ((0.0,), (0.0,)), ((1.0,), (-0.5,))])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_coefficients_may_be_0_or_negative(
    ce: tuple[float], kl: tuple[float], temperature: float
) -> None:
    hidden, weight, labels = inputs_of(1)
    teacher = teacher_of(temperature)
    got = linear_cross_entropy(hidden, weight, labels, ce, kl, teacher, 5).total
    expected = naive(hidden, weight, labels, ce, kl, teacher).total
    gradients_close(got, expected, [*hidden, weight])
    theirs = (teacher.hidden_TD, teacher.weight_VD)
    assert torch.autograd.grad(got, theirs, allow_unused=True) == (None, None)


def test_a_model_diverges_from_itself_by_nothing() -> None:
    """An exit as its own teacher: no divergence, and no gradient through the teacher's side."""
    hidden, weight, labels = inputs_of(1)
    teacher = Teacher(hidden[0], weight, 3.0)
    got = linear_cross_entropy(hidden, weight, labels, [0.0], [1.0], teacher, 4)
    assert got.kl_X.tolist() == pytest.approx([0.0], abs=1e-12)
    grads = torch.autograd.grad(got.total, [*hidden, weight])
    assert all(grad.abs().max() < 1e-12 for grad in grads)


def test_gradients_of_a_tied_weight_add_up() -> None:
    """The weight as embedding too, and two losses of the same head."""
    hidden, weight, labels = inputs_of(2)
    ids = torch.arange(T) % V

    def loss(function: Any) -> Tensor:
        states = [h * F.embedding(ids, weight).sin() for h in hidden]
        once = function(states, weight, labels, CE[:2]).total
        return once + function(states[:1], weight, labels.flip(0), [0.7]).total ** 2

    gradients_close(loss(linear_cross_entropy), loss(naive), [*hidden, weight])


def test_second_derivatives_are_refused() -> None:
    hidden, weight, labels = inputs_of(1)
    total = linear_cross_entropy(hidden, weight, labels, [1.0]).total
    (grad,) = torch.autograd.grad(total**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight, labels = inputs_of(3)
    expected = naive(hidden, weight, labels, CE).total
    frozen, states = weight.detach(), [h.detach() for h in hidden]
    got = linear_cross_entropy(hidden, frozen, labels, CE, chunk_tokens=5).total
    gradients_close(got, expected, hidden)
    got = linear_cross_entropy([hidden[0], *states[1:]], weight, labels, CE, chunk_tokens=5).total
    gradients_close(got, expected, [hidden[0], weight])
    assert not linear_cross_entropy(states, frozen, labels, CE).total.requires_grad
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels, CE, chunk_tokens=5).total
    assert not got.requires_grad
    close([got], [expected])


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_loss_of_each_token(chunk_tokens: int | None) -> None:
    hidden, weight, labels = inputs_of(1)
    got = token_cross_entropy(hidden[0], weight, labels, chunk_tokens)
    assert not got.requires_grad
    expected = F.cross_entropy(F.linear(hidden[0], weight), labels, reduction="none")
    close([got], [expected], 1e-12)


def test_no_token_is_no_loss() -> None:
    hidden, weight, labels = inputs_of(2, sizes=(0, D, V))
    got = linear_cross_entropy(hidden, weight, labels, CE[:2])
    assert got.total == 0
    assert token_cross_entropy(hidden[0], weight, labels).shape == (0,)
    assert all((g == 0).all() for g in torch.autograd.grad(got.total, [*hidden, weight]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_large_logits_stay_finite(temperature: float) -> None:
    """Logits of hundreds in fp32, far from each other and from 0."""
    hidden, weight, labels = inputs_of(1, torch.float32)
    hidden = [(200 * h.detach()).requires_grad_() for h in hidden]
    teacher = teacher_of(temperature, torch.float32)
    got = linear_cross_entropy(hidden, weight, labels, [1.0], [1.0], teacher, 5)
    exact = [t.detach().double().requires_grad_() for t in (*hidden, weight)]
    expected = naive(exact[:1], exact[1], labels, [1.0], [1.0], teacher_of(temperature))
    close([got.total], [expected.total], 1e-6)
    grads = torch.autograd.grad(got.total, [*hidden, weight])
    close(grads, torch.autograd.grad(expected.total, exact), 1e-5)


class Meter(TorchDispatchMode):
    """Watches the dtypes of products and tensors `[rows, V]`: the largest, and bytes alive."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.dtypes: set[torch.dtype] = set()
        self.largest = self.peak = 0
        self._seen: list[TensorWeakRef] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {t.dtype for t in tensors}
        for t in tensors:
            # A transposed weight is as wide, but not contiguous.
            if t.dim() == 2 and t.shape[1] == self.vocabulary and t.is_contiguous():
                self.largest = max(self.largest, t.numel())
                self._seen.append(TensorWeakRef(t))
        living = [(ref, t.untyped_storage()) for ref in self._seen if (t := ref()) is not None]
        self._seen = [ref for ref, _ in living]
        storages = {storage.data_ptr(): storage.nbytes() for _, storage in living}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("chunk_tokens", [20, 64])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_follows_autocast(temperature: float | None, chunk_tokens: int) -> None:
    """All products in bf16, losses and gradients in fp32, as close as the naive loss is."""
    hidden, weight, labels = inputs_of(3, torch.float32, (64, 32, 50))
    teacher = None if temperature is None else teacher_of(temperature, torch.float32, 64, 50)
    kl = None if teacher is None else KL
    with torch.autocast("cpu", torch.bfloat16):
        expected = naive(hidden, weight, labels, CE, kl, teacher)
        with Meter(50) as meter:
            got = linear_cross_entropy(hidden, weight, labels, CE, kl, teacher, chunk_tokens)
            got_T = token_cross_entropy(hidden[0], weight, labels, chunk_tokens)
    assert meter.dtypes == {torch.bfloat16}
    losses = (*vars(got).values(), got_T.sum())
    assert {loss.dtype for loss in losses} == {torch.float32}
    close(losses, (*vars(expected).values(), expected.ce_X[0]), 1e-5)
    gradients_close(got.total, expected.total, [*hidden, weight], 0.01)


def test_small_coefficients_survive_half_precision() -> None:
    """1 over the tokens of a large step is beneath what fp16 can tell from 0."""
    hidden, weight, labels = inputs_of(1, torch.float32, (64, 32, 50))
    with torch.autocast("cpu", torch.float16):
        got = linear_cross_entropy(hidden, weight, labels, [1e-9], chunk_tokens=20).total
    expected = naive(hidden, weight, labels, [1.0]).total
    gradients_close(1e9 * got, expected, [*hidden, weight], 0.005)


def test_inputs_in_half_precision() -> None:
    """Without autocast bf16 stays bf16, but for the losses; fp64 is left alone under autocast."""
    hidden, weight, labels = inputs_of(1, torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, labels, [1.0], chunk_tokens=5)
    expected = naive(hidden, weight, labels, [1.0])
    close([got.total], [expected.total], 1e-5)
    gradients_close(got.total, expected.total, [*hidden, weight], 0.01)
    hidden, weight, labels = inputs_of(1)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, labels, [1.0], chunk_tokens=5).total
    close([total], [naive(hidden, weight, labels, [1.0]).total], 1e-12)


class Rows:
    """The definition of `RowLosses`; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.dtype, bool]] = []

    def __call__(self, logits_CV: Tensor, labels_C1: Tensor, with_gradients: bool) -> Tensor:
        assert logits_CV.is_contiguous()
        self.asked.append((logits_CV.dtype, with_gradients))
        exact = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        one_hot = F.one_hot(labels_C1.squeeze(1), exact.shape[1])
        losses_C = (exact.logsumexp(1, keepdim=True) - exact.gather(1, labels_C1)).squeeze(1)
        logits_CV.copy_(exact.softmax(1) - one_hot) if with_gradients else logits_CV.fill_(99.0)
        return losses_C


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_losses_of_rows_may_be_computed_by_another(chunk_tokens: int | None, exits: int) -> None:
    """Values and gradients are the same, also of coefficients that are negative or 0."""
    hidden, weight, labels = inputs_of(exits)
    rows, ce = Rows(), (-0.25, 0.0, 2.0)[:exits]
    got = linear_cross_entropy(
        hidden, weight, labels, ce, chunk_tokens=chunk_tokens, row_losses=rows
    )
    expected = naive(hidden, weight, labels, ce)
    close(tuple(vars(got).values()), tuple(vars(expected).values()))
    gradients_close(0.37 * got.total, 0.37 * expected.total, [*hidden, weight])
    assert set(rows.asked) == {(torch.float64, True)}
    got_T = token_cross_entropy(hidden[0], weight, labels, chunk_tokens, row_losses=rows)
    assert rows.asked[-1] == (torch.float64, False)
    close([got_T.sum()], [expected.ce_X[0]])


def test_gradients_of_rows_are_asked_for_where_they_are_wanted() -> None:
    hidden, weight, labels = inputs_of(2)
    rows = Rows()
    frozen = (hidden[0], hidden[1].detach())
    linear_cross_entropy(frozen, weight.detach(), labels, CE[:2], row_losses=rows)
    with torch.no_grad():
        linear_cross_entropy(hidden[:1], weight, labels, CE[:1], row_losses=rows)
    assert [with_gradients for _, with_gradients in rows.asked] == [True, False, False]


class Whole:
    """The only part of a vocabulary."""

    first = 0

    def maximum(self, values_C: Tensor) -> Tensor:
        return values_C

    def total(self, values: Tensor) -> Tensor:
        return values


def test_a_teacher_or_a_part_of_the_vocabulary_needs_more_than_rows() -> None:
    hidden, weight, labels = inputs_of(1)
    rows, teacher = Rows(), teacher_of(2.0)
    got = linear_cross_entropy(hidden, weight, labels, [1.0], [0.5], teacher, row_losses=rows)
    close([got.total], [naive(hidden, weight, labels, [1.0], [0.5], teacher).total])
    got = linear_cross_entropy(hidden, weight, labels, [1.0], vocabulary=Whole(), row_losses=rows)
    close([got.total], [naive(hidden, weight, labels, [1.0]).total])
    token_cross_entropy(hidden[0], weight, labels, vocabulary=Whole(), row_losses=rows)
    assert rows.asked == []


@pytest.mark.parametrize("coefficient", [1.0, 1e-9])
def test_rows_read_logits_as_the_product_left_them(coefficient: float) -> None:
    """In bf16 under autocast, fp32 losses; coefficients beneath what fp16 holds survive."""
    hidden, weight, labels = inputs_of(2, torch.float32, (64, 32, 50))
    expected = naive(hidden, weight, labels, [1.0, 0.5]).total
    for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.005)):
        rows = Rows()
        with torch.autocast("cpu", dtype):
            got = linear_cross_entropy(
                hidden,
                weight,
                labels,
                [coefficient, coefficient / 2],
                chunk_tokens=20,
                row_losses=rows,
            ).total
        assert set(rows.asked) == {(dtype, True)}
        assert got.dtype == torch.float32
        gradients_close(got / coefficient, expected, [*hidden, weight], bound)


def measured(function: Any, exits: int, *options: Any, **more: Any) -> Meter:
    """Forward and backward of 40 tokens over 100 words under the meter."""
    hidden, weight, labels = inputs_of(exits, torch.float32, (40, 8, 100))
    ones = [1.0] * exits
    with Meter(100) as meter:
        kl = (ones, *options) if options else ()
        function(hidden, weight, labels, ones, *kl, **more).total.backward()
    return meter


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
@pytest.mark.parametrize("exits", [1, 4])
def test_memory_does_not_grow_with_the_number_of_exits(
    exits: int, temperature: float | None, bf16: bool
) -> None:
    """One buffer of a chunk in fp32, three with a teacher; bf16 adds half a buffer per head."""
    options = () if temperature is None else (teacher_of(temperature, torch.float32, 40, 100),)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        meter = measured(linear_cross_entropy, exits, *options, chunk_tokens=16)
    buffers, heads = (3, 2) if options else (1, 1)
    assert meter.largest == 16 * 100
    assert meter.peak == (4 * buffers + 2 * heads * bf16) * 16 * 100


def test_rows_need_no_copy_of_their_logits() -> None:
    """With bf16 products 2 bytes per logit of a chunk, for any number of exits."""

    def in_place(logits_CV: Tensor, labels_C1: Tensor, with_gradients: bool) -> Tensor:
        return logits_CV[:, 0].float()

    with torch.autocast("cpu", torch.bfloat16):
        meter = measured(linear_cross_entropy, 4, chunk_tokens=16, row_losses=in_place)
    assert meter.peak == 2 * 16 * 100


def test_the_meter_sees_whole_logits() -> None:
    """The same measurement finds them in the naive loss, where they add up over exits."""
    one, four = measured(naive, 1), measured(naive, 4)
    assert one.largest == four.largest == 40 * 100
    assert four.peak >= one.peak + 3 * 4 * 40 * 100


def test_a_chunk_is_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default no more chunks than needed, and of one size: 40 tokens in chunks of up to 19."""
    for allowed, tokens in ((19 * 4 * 100, 14), (2**20, 40), (1, 1)):
        monkeypatch.setattr(kernel, "CHUNK_BYTES", allowed)
        assert measured(linear_cross_entropy, 1).largest == tokens * 100


@pytest.mark.parametrize("bf16", [False, True])
def test_is_repeatable_with_two_threads(bf16: bool, request: pytest.FixtureRequest) -> None:
    """Bit for bit, whatever else was allocated in between."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    sizes = (300, 48, 1000)
    hidden, weight, labels = inputs_of(3, torch.float32, sizes)
    teacher = teacher_of(2.0, torch.float32, sizes[0], sizes[2])
    results, ballast = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for run in range(6):
            ballast.append(torch.ones(1000 * run + 7))
            losses = linear_cross_entropy(hidden, weight, labels, CE, KL, teacher, 128)
            grads = torch.autograd.grad(losses.total, [*hidden, weight])
            results.append([*vars(losses).values(), *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("exits", [1, 3])
def test_flops(exits: int, with_teacher: bool, bf16: bool) -> None:
    """A head costs 2TDV forward and 4TDV more for gradients, also when those come forward."""
    hidden, weight, labels = inputs_of(exits, torch.float32)
    teacher = teacher_of(2.0, torch.float32) if with_teacher else None
    kl = KL[:exits] if with_teacher else None
    lesson = 2 * T * TEACHER_WIDTH * V if with_teacher else 0

    def count(states: list[Tensor], head: Tensor) -> int:
        with (
            FlopCounterMode(display=False) as counter,
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            total = linear_cross_entropy(states, head, labels, CE[:exits], kl, teacher, 5).total
            if total.requires_grad:
                total.backward()
        return counter.get_total_flops() - lesson

    product = 2 * T * D * V * exits
    assert count(hidden, weight) == 3 * product
    assert count(hidden, weight.detach()) == 2 * product
    assert count([h.detach() for h in hidden], weight) == 2 * product
    with torch.no_grad():
        assert count(hidden, weight) == product
    with FlopCounterMode(display=False) as counter:
        token_cross_entropy(hidden[0], weight, labels, 5)
    assert counter.get_total_flops() == 2 * T * D * V


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("2 exits, but 1 and 2 coefficients", ([1.0],)),
        ("2 exits, but 2 and 1 coefficients", (CE[:2], [1.0], teacher_of(1.0))),
        ("together", (CE[:2], KL[:2])),
        ("together", (CE[:2], None, teacher_of(1.0))),
        ("chunk_tokens is 0", (CE[:2], None, None, 0)),
        ("14 tokens, but 13 labels", (CE[:2], KL[:2], teacher_of(1.0, tokens=T + 1))),
    ],
)
def test_what_does_not_fit_together_is_refused(message: str, arguments: tuple[Any, ...]) -> None:
    hidden, weight, labels = inputs_of(2)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, *arguments)
    with pytest.raises(ValueError, match="13 tokens, but 12 labels"):
        linear_cross_entropy(hidden, weight, labels[1:], CE[:2])
    with pytest.raises(ValueError, match="13 tokens, but 12 labels"):
        token_cross_entropy(hidden[0], weight, labels[1:])


@pytest.mark.parametrize("label", [-1, -100, V])
def test_a_label_outside_of_the_vocabulary_is_refused(label: int) -> None:
    hidden, weight, labels = inputs_of(1)
    labels[3] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels, [1.0])
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_cross_entropy(hidden[0], weight, labels)
