"""The definition of the model: one decoder in plain single-process PyTorch.

Shape suffixes used throughout the room:

    B rows           T tokens (B * S)        H query heads       N experts a router scores
    S sequence       D hidden size           G key-value heads   E FFN experts
    V vocabulary     F expert width          C head channels     K experts per token / kept tokens
"""
