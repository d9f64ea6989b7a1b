"""Model and optimizer as flat name -> tensor maps, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.errors import CheckpointError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, under its unique-layer name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<key>`; groups and rates follow from the config."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved parameters into the model. Raises CheckpointError where names or shapes differ."""
    parameters = dict(model.named_parameters())
    for name in parameters.keys() ^ tensors.keys():
        where = "checkpoint" if name in parameters else "model"
        raise CheckpointError(f"checkpoint: parameter {name} is not in the {where}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"checkpoint: {name} is {list(tensors[name].shape)}, "
                f"the model's is {list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Replace the optimizer's state by the saved one."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"checkpoint: optimizer state of unknown parameter {name}")
        # Step counters stay where the optimizer made them; moments live beside their parameter.
        device = value.device if value.dim() == 0 else parameters[name].device
        optimizer.state[parameters[name]][key] = value.to(device)
