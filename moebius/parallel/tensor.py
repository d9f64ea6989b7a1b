"""Tensor and sequence parallelism: heads, widths and vocabulary cut along `tp`.

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al. 2022,
arXiv 2205.05198): the first map of a sublayer is cut by outputs, the last by inputs, so a sublayer
communicates once at its beginning and once at its end. The modules are the model's own: they take
their sizes from their weights.
"""

import torch.distributed as dist
from torch import Tensor, nn

from moebius.model.attention import Attention
from moebius.model.bdh import BDHLayer
from moebius.model.decoder import Decoder, Embedding
from moebius.model.ffn import SwiGLU
from moebius.model.parameters import Linear
from moebius.model.region import Region
from moebius.model.visit import VisitLinear
from moebius.parallel.comm import Group
from moebius.parallel.functions import add_up, gather_shared, scatter_sum, share
from moebius.parallel.placement import Cut


class TensorRegion(Region):
    """Weights cut along a group; with `sequence` tokens are, too, outside of the region."""

    def __init__(self, group: Group, sequence: bool) -> None:
        self.group = group
        self.sequence = sequence

    def enter(self, x_BSD: Tensor) -> Tensor:
        """See `Region`."""
        if self.sequence:
            return gather_shared(x_BSD, self.group, dim=1)
        return share(x_BSD, self.group)

    def leave(self, y_BSD: Tensor) -> Tensor:
        """See `Region`."""
        if self.sequence:
            return scatter_sum(y_BSD, self.group, dim=1)
        return add_up(y_BSD, self.group)


class VocabularyPart:
    """The own rows of embedding and head, see `kernels.vocabulary.Vocabulary`."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        self.group = group
        self.first = group.rank * (vocab_size // group.size)

    def maximum(self, values_C: Tensor) -> Tensor:
        """The largest of all parts' values."""
        return self.group.all_reduce(values_C.contiguous(), dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all parts' values."""
        return self.group.all_reduce(values.contiguous())


def split_weights(decoder: Decoder, group: Group, sequence: bool) -> dict[nn.Parameter, Cut | None]:
    """Tell modules that their weights are cut, and say how each is.

    None stands for a weight that is whole, though each process has only a part of its gradient.
    """
    region = TensorRegion(group, sequence)
    found: dict[nn.Parameter, Cut | None] = {}
    for module in decoder.modules():
        if isinstance(module, Attention):
            copies = max(1, group.size // module.config.num_kv_heads)
            found |= _by_outputs(module.q, group)
            found |= _by_outputs(module.k, group, copies)
            found |= _by_outputs(module.v, group, copies)
            found |= _by_inputs(module.out, group)
        elif isinstance(module, SwiGLU):
            found |= _by_outputs(module.gate, group)
            found |= _by_outputs(module.up, group)
            found |= _by_inputs(module.down, group)
        elif isinstance(module, BDHLayer):
            found |= {p: Cut(group, 0) for p in module.parameters()}
        else:
            continue
        module.region = region
    decoder.vocabulary = VocabularyPart(group, decoder.config.vocab_size)
    decoder.head_region = region
    for name in ("embedding", "head"):  # a pipeline stage may lack them
        ends: Embedding | Linear | None = getattr(decoder, name, None)
        if isinstance(ends, Embedding):
            ends.vocabulary, ends.region = decoder.vocabulary, region
        if ends is not None:
            found[ends.weight] = Cut(group, 0)
    return found


def _by_outputs(
    linear: VisitLinear, group: Group, copies: int = 1
) -> dict[nn.Parameter, Cut | None]:
    cuts: dict[nn.Parameter, Cut | None] = {linear.weight: Cut(group, 0, copies=copies)}
    if linear.adapter is not None:
        cuts |= {linear.down: None, linear.up: Cut(group, 1, copies=copies)}
    return cuts


def _by_inputs(linear: VisitLinear, group: Group) -> dict[nn.Parameter, Cut | None]:
    cuts: dict[nn.Parameter, Cut | None] = {linear.weight: Cut(group, 1)}
    if linear.adapter is not None:
        cuts |= {linear.down: Cut(group, 2), linear.up: None}
    return cuts
