"""MoE models of Hugging Face transformers, of the shape of ours."""

from collections.abc import Callable
from typing import Any

import torch
from models import TOP_K

from moebius.data.batch import Batch

PEERS = ("mixtral", "qwen3_moe", "olmoe")


def build(
    name: str, hidden: int, layers: int, heads: int, vocabulary: int, width: int, experts: int
) -> Any:
    """A model for causal language modelling in training mode, random weights, all else default."""
    import transformers

    common: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "num_experts_per_tok": TOP_K,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == "mixtral":
        config: Any = transformers.MixtralConfig(
            **common, intermediate_size=width, num_local_experts=experts
        )
    elif name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common,
            moe_intermediate_size=width,
            num_experts=experts,
            norm_topk_prob=True,
        )
    else:
        config = transformers.OlmoeConfig(
            **common, intermediate_size=width, num_experts=experts, norm_topk_prob=True
        )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def experts_implementation(model: Any) -> str:
    """What computes its experts."""
    return str(model.config._experts_implementation)


def stepper(
    model: Any, optimizer: torch.optim.Optimizer, foreach: bool | None
) -> Callable[[Batch], None]:
    """Forward, backward, clipping, optimizer."""

    def step(batch: Batch) -> None:
        # The model shifts labels by itself.
        model(input_ids=batch.tokens_BS, labels=batch.tokens_BS, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
        optimizer.step()
        optimizer.zero_grad()

    return step
