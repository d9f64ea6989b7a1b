"""Model and optimizer as flat name -> tensor maps, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.errors import CheckpointError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, under its unique-layer name."""
    return model.state_dict()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<key>`; groups and rates follow from the config."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into the model. Raises CheckpointError where names or shapes differ."""
    own = model.state_dict()
    _check(own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Replace the optimizer's state by the saved one; raises CheckpointError if it does not fit.

    A parameter that never had a gradient (a router that nothing asks) has no state.
    """
    parameters = dict(model.named_parameters())
    saved_names = {path.rpartition("/")[0] for path in tensors}
    moments = {
        f"{name}/{key}": parameter
        for name, parameter in parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
        if name in saved_names
    }
    _check(moments, {path: value for path, value in tensors.items() if value.dim() > 0})
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        # Fused AdamW keeps its step counters, too, on the device of the parameter.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


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
