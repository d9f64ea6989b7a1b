"""Saved tensors of a model and its optimizer, by name: do they fit, and into the model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.errors import CheckpointError


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into a whole model. Raises CheckpointError where names or shapes differ."""
    check_model(model, tensors)
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensors[name])


def check_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where saved tensors are not a model's parameters and buffers."""
    _check(model.state_dict(), tensors)


def check_optimizer(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a saved optimizer's state, `<parameter>/<key>`, is not a model's.

    A parameter that never had a gradient (a router that nothing asks) has no state.
    """
    saved_names = {path.rpartition("/")[0] for path in tensors}
    moments = {
        f"{name}/{key}": parameter
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if name in saved_names
    }
    _check(moments, {path: value for path, value in tensors.items() if value.dim() > 0})


def _check(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name in sorted(own.keys() ^ saved.keys()):
        where = "checkpoint" if name in own else "model"
        raise CheckpointError(f"checkpoint: {name} is not in the {where}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"checkpoint: {name} is {list(saved[name].shape)}, "
                f"the model's is {list(tensor.shape)}"
            )
