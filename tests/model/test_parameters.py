"""Roles and initial values."""

import pytest
import torch
from torch import nn

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import Role, initialize, named_specs
from tests.conftest import model_tree
from tests.model.helpers import build


def test_roles_of_every_kind_of_parameter() -> None:
    roles = {name: spec.role for name, _, spec in named_specs(build(tie_embeddings=False).decoder)}
    assert len(roles) == len(list(build(tie_embeddings=False).decoder.parameters()))
    expected = {
        "embedding.weight": Role.EMBED,
        "head.weight": Role.HEAD,
        "layers.1.attention.q.weight": Role.MATRIX,
        "layers.1.ffn.experts.groups.0.gate_up": Role.EXPERT,
        "layers.1.ffn.routers.0.scorer.weight": Role.ROUTER,
        "layers.1.ffn.routers.0.scorer.residual": Role.ROUTER,
        "layers.1.ffn.experts.zero.mix": Role.ROUTER,
        "layers.1.ffn.experts.zero.constants": Role.BIAS,
        "layers.1.attention_norm.weight": Role.NORM_IN,
        "depth_routers.0.scorers.0.weight": Role.ROUTER,
    }
    assert {name: roles[name] for name in expected} == expected


def test_a_parameter_without_a_role_is_refused() -> None:
    decoder = build().decoder
    decoder.layers["0"].stray = nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError, match=r"layers\.0\.stray"):
        list(named_specs(decoder))


def test_initial_values_depend_on_seed_and_name_only() -> None:
    """A model with other layers around it starts with the same values under the same names."""
    small = build(depth={"num_layers": 2}).decoder.state_dict()
    large = build(depth={"num_layers": 3}).decoder.state_dict()
    other = build(depth={"num_layers": 2}, seed=1).decoder.state_dict()
    drawn = [name for name in small if small[name].std() > 0]
    assert len(drawn) > 10
    for name in drawn:
        assert torch.equal(small[name], large[name])
        assert not torch.equal(small[name], other[name])
    matrices = [small[name] for name in drawn if name.endswith("q.weight")]
    assert not torch.equal(matrices[0], matrices[1])
    assert float(torch.cat(matrices).std()) == pytest.approx(0.02, rel=0.1)


def test_initialisation_ignores_the_global_generator() -> None:
    decoder = Decoder(ModelConfig.model_validate(model_tree()))
    state = torch.get_rng_state()
    initialize(decoder, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_moe_layer_has_no_residual_it_would_never_use() -> None:
    names = dict(build().decoder.named_parameters())
    assert "layers.0.ffn.routers.0.scorer.residual" not in names
    assert names["layers.1.ffn.routers.0.scorer.residual"].abs().max().item() == 0.0
