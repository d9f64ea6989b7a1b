"""What a model's checkpoint holds, and a whole model's parts."""

from collections.abc import Collection

from torch import nn

from moebius.model.parameters import Role, named_specs
from moebius.parallel.engine import MOMENTS
from moebius.parallel.part import Part
from moebius.trainer.muon import MOMENTUM

Shapes = dict[str, tuple[int, ...]]


def model_shapes(model: nn.Module) -> Shapes:
    """Of parameters and buffers, by their names in a checkpoint."""
    return {f"model/{name}": tuple(t.shape) for name, t in model.state_dict().items()}


def optimizer_shapes(model: nn.Module, of_muon: Collection[Role] = ()) -> Shapes:
    """Of the state that is kept of every parameter that is trained: by Muon for those of some
    roles, by AdamW for the others."""
    shapes: Shapes = {}
    for name, parameter, spec in named_specs(model):
        if spec.role is not Role.FROZEN and parameter.numel():
            kept = [MOMENTUM] if spec.role in of_muon else [*MOMENTS]
            shapes |= {f"optimizer/{name}/{key}": tuple(parameter.shape) for key in kept}
            if spec.role not in of_muon:
                shapes[f"optimizer/{name}/step"] = ()
    return shapes


def model_parts(model: nn.Module) -> dict[str, Part]:
    """All of a model that is in one process."""
    return {f"model/{name}": Part.of(tensor) for name, tensor in model.state_dict().items()}
