"""Parameter groups by role, and one step against the closed form of AdamW."""

from typing import get_args

import pytest
import torch
from torch import nn

from moebius.model.parameters import ParameterSpec, Role, named_specs
from moebius.trainer.optim import OptimConfig, RoleName, RoleOptions, build_optimizer, set_lr
from tests.model.helpers import build, random_batch


def test_config_knows_every_role_that_is_trained() -> None:
    assert set(get_args(RoleName)) == {role.value for role in Role} - {Role.FROZEN.value}


def trained(model: nn.Module) -> list[tuple[nn.Parameter, ParameterSpec]]:
    return [(parameter, spec) for _, parameter, spec in named_specs(model)]


def test_each_parameter_is_in_one_group_with_the_options_of_its_role() -> None:
    decoder = build().decoder
    roles = {
        "router": RoleOptions(lr_scale=0.5, weight_decay=0.0),
        "norm_in": RoleOptions(weight_decay=0.3),
    }
    optimizer = build_optimizer(trained(decoder), OptimConfig(weight_decay=0.1, roles=roles))
    set_lr(optimizer, 2.0)
    options = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {Role.ROUTER: (1.0, 0.0), Role.NORM_IN: (2.0, 0.3), Role.BIAS: (2.0, 0.0)}
    count = 0
    for _, parameter, spec in named_specs(decoder):
        assert options[id(parameter)] == expected.get(spec.role, (2.0, 0.1))
        count += 1
    assert count == sum(len(group["params"]) for group in optimizer.param_groups)


def test_first_step_is_adamw() -> None:
    """`w - lr * (wd * w + g / (|g| + eps))` after bias correction."""
    executor = build()
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(trained(executor.decoder), config)
    executor.accumulate_gradients([random_batch(2, 8)])
    parameter = executor.decoder.get_parameter("layers.1.attention.q.weight")
    before, gradient = parameter.detach().clone(), parameter.grad
    assert gradient is not None
    gradient = gradient.clone()
    set_lr(optimizer, 1e-2)
    optimizer.step()
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + config.eps)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie", [True, False])
def test_a_role_that_does_not_occur_is_no_group(tie: bool) -> None:
    optimizer = build_optimizer(trained(build(tie_embeddings=tie).decoder), OptimConfig())
    assert len(optimizer.param_groups) == (6 if tie else 7)
