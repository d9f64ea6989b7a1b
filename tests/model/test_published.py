"""Our decoder against published architectures as implemented in `transformers`, weights copied."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moebius.model.executor import LocalExecutor
from tests.model.helpers import build, hidden, random_batch

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
COMMON = {
    "hidden_size": 64,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "depth": {"num_layers": 3},
    "tie_embeddings": False,
}
NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn.gate.": "mlp.gate_proj.",
    "ffn.up.": "mlp.up_proj.",
    "ffn.down.": "mlp.down_proj.",
    "ffn.routers.0.scorer.weight": "mlp.gate.weight",
    "ffn.experts.groups.0.gate_up": "mlp.experts.gate_up_proj",
    "ffn.experts.groups.0.down": "mlp.experts.down_proj",
}


def published_name(name: str) -> str:
    if name in ("embedding.weight", "norm.weight", "head.weight"):
        return NAMES[name]
    for ours, theirs in NAMES.items():
        if f".{ours}" in name:
            return "model." + name.replace(ours, theirs)
    raise KeyError(name)


def logits_agree(ours: LocalExecutor, theirs: torch.nn.Module) -> None:
    """Copy every parameter and compare logits on random tokens to 1e-5."""
    state = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.decoder.named_parameters():
            if "experts.zero" in name:
                assert parameter.numel() == 0
                continue
            parameter.copy_(state[published_name(name)])
        batch = random_batch(2, 40)
        got = ours.decoder.logits(hidden(ours, batch))
        expected = theirs(batch.tokens_BS).logits
    assert float(expected.std()) > 0.1, "the comparison must be of more than noise"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_dense_decoder_equals_llama() -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")).eval()
    ours = build(ffn={"kind": "dense", "intermediate_size": 96}, **COMMON)
    logits_agree(ours, theirs)


def test_top_2_moe_equals_mixtral() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SHAPE,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=None,
        attn_implementation="eager",
    )
    theirs = MixtralForCausalLM(config).eval()
    ffn = {
        "kind": "moe",
        "experts": [{"kind": "ffn", "count": 6, "intermediate_size": 96}],
        "router": {"weights": {"kind": "renormalize"}},
    }
    logits_agree(build(ffn=ffn, **COMMON), theirs)
