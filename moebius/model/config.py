"""Configuration of the model; `rules` holds what spans its fields."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, Tag

from moebius.config import ConfigNode, kind_or
from moebius.model.moe.config import MoEConfig, RouterConfig
from moebius.model.moe.pool import PoolShape
from moebius.model.recursion.config import DepthConfig


class AttentionShape(ConfigNode):
    """What all kinds of attention have in common."""

    num_heads: PositiveInt
    """query heads; of each expert in a mixture"""
    num_kv_heads: PositiveInt
    """key-value heads; each serves `num_heads / num_kv_heads` query heads"""
    head_dim: int = Field(ge=2, multiple_of=2)
    """channels of one head; even, because rotary embedding turns pairs"""
    core: Literal["softmax", "stick_breaking"] = "softmax"
    """how scores become weights; stick_breaking prefers recent tokens by itself (ModuleFormer)"""
    positions: Literal["rope", "none"] = "rope"
    """rotary embedding, or none as with stick_breaking"""
    rope_theta: float = Field(10_000.0, gt=0)
    """base of the rotary frequencies"""


class DepthAttentionConfig(ConfigNode):
    """Values mixed over depth before they are mixed over the sequence (arXiv 2606.05014)."""

    scope: Literal["all", "window", "recursions"] = "all"
    """which earlier visits a token looks at: all; the last `window - 1`; or those of the same
    layer, whose keys stay where the layer is"""
    window: int = Field(2, ge=2)
    """with scope `window`: visits, the present one included"""


class AttentionConfig(AttentionShape):
    """Grouped-query attention."""

    kind: Literal["standard"] = "standard"
    depth_attention: DepthAttentionConfig | None = None
    """mix each token's values with those of its earlier layers"""


class MixtureAttentionConfig(AttentionShape):
    """A mixture of attention experts with their own queries and outputs (ModuleFormer, BAM)."""

    kind: Literal["mixture"] = "mixture"
    num_experts: PositiveInt
    """N, attention experts of a layer"""
    kv: Literal["shared", "per_expert"] = "shared"
    """keys and values: the same for all experts, or each expert's own (selector `all` only)"""
    router: RouterConfig = RouterConfig()
    """who attends with which expert"""

    @property
    def pool(self) -> PoolShape:
        """The pool."""
        return PoolShape((("attention", self.num_experts),))

    @property
    def num_assignments(self) -> int:
        """K, the most experts a token can have."""
        return self.router.selector.max_assignments(self.num_experts)


class BDHConfig(ConfigNode):
    """The whole layer of a Dragon Hatchling (arXiv 2509.26507): linear attention between many
    sparse positive neurons, multiplied with them; takes the place of attention and feed-forward."""

    kind: Literal["bdh"] = "bdh"
    num_heads: PositiveInt = 4
    """heads"""
    neurons: int = Field(ge=2, multiple_of=2)
    """N, neurons of each head; the authors take `128 * hidden_size / num_heads`"""
    rope_theta: float = Field(65_536.0, gt=0)
    """base of the rotary frequencies"""

    @property
    def head_dim(self) -> int:
        """Channels that the rotation turns."""
        return self.neurons


class NoFFN(ConfigNode):
    """Nothing; the first sublayer is the whole layer."""

    kind: Literal["none"] = "none"


class ExitsConfig(ConfigNode):
    """Heads that read the stream before its end, all of them the model's own norm and head."""

    after: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
    """numbers of unrolled layers; the end is always an exit"""
    coefficient: NonNegativeFloat = 0.1
    """weight of the cross-entropy of each early exit; the last has 1"""
    normalize: bool = False
    """divide the weights by their sum; with coefficient 1 this is Sorted LLaMA (2309.08968)"""
    self_distillation: NonNegativeFloat = 0.0
    """weight, times the exit's, of the divergence from the detached predictions of the last exit
    (Relaxed Recursive Transformers, 2410.20672)"""
    draw: Literal["all", "step", "micro_batch"] = "all"
    """which exits are trained: all, or one drawn for the step or micro-batch, behind which nothing
    runs (SortedNet, 2309.00255)"""


class DenseConfig(ConfigNode):
    """One SwiGLU for all tokens."""

    kind: Literal["dense"] = "dense"
    intermediate_size: PositiveInt
    """width between the two projections"""


class ModelConfig(ConfigNode):
    """A decoder-only transformer, routed over width and depth."""

    vocab_size: PositiveInt
    """rows of the embedding; token ids must be smaller"""
    hidden_size: PositiveInt
    """width of the residual stream"""
    attention: Annotated[
        Annotated[AttentionConfig, Tag("standard")]
        | Annotated[MixtureAttentionConfig, Tag("mixture")]
        | Annotated[BDHConfig, Tag("bdh")],
        kind_or("standard"),
    ]
    """the first sublayer of every block; of kind `standard` where none is given"""
    ffn: Annotated[DenseConfig | MoEConfig | NoFFN, Field(discriminator="kind")]
    """the second sublayer of every block"""
    block: Literal["sequential", "parallel"] = "sequential"
    """parallel: both sublayers read the block's input through one norm (BAM)"""
    depth: DepthConfig
    exits: ExitsConfig | None = None
    """early exits"""
    layer_norm_scaling: Literal["none", "unrolled", "unique"] = "none"
    """divide the output of the norms in front of sublayers by the root of the layer's number, from
    1, among unrolled or unique layers (Curse of Depth, 2502.05795)"""
    tie_embeddings: bool = True
    """use the embedding as the output head"""
    norm_eps: float = Field(1e-5, gt=0)
    """added to the mean square in RMSNorm"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of initial weights"""

    @property
    def routers(self) -> dict[str, RouterConfig]:
        """By sublayer, the configurations of the routers over width."""
        sublayers = {"attention": self.attention, "ffn": self.ffn}
        return {
            name: node.router
            for name, node in sublayers.items()
            if isinstance(node, MixtureAttentionConfig | MoEConfig)
        }

    def attention_in(self, index: int) -> AttentionConfig | MixtureAttentionConfig:
        """The first sublayer of a unique layer, in which lists are numbers."""
        if isinstance(self.attention, BDHConfig):
            raise TypeError("a bdh layer has no sublayers")
        if isinstance(self.attention, AttentionConfig):
            return self.attention
        router = self.attention.router.in_layer(index)
        return self.attention.model_copy(update={"router": router})

    def ffn_in(self, index: int, num_layers: int) -> DenseConfig | MoEConfig | NoFFN:
        """The second sublayer of a unique layer, in which lists and schedules are numbers."""
        if not isinstance(self.ffn, MoEConfig):
            return self.ffn
        dense = self.ffn.dense
        if dense is not None and index in dense.layers:
            return DenseConfig(intermediate_size=dense.intermediate_size)
        return self.ffn.in_layer(index, num_layers)
