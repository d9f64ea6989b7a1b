"""The presets are what they say they are."""

import pytest
import torch

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import named_specs
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import REPOSITORY


def decoder_of(model: ModelConfig) -> Decoder:
    """The decoder of a config, not allocated."""
    with torch.device("meta"):
        return Decoder(model)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=str)
def test_every_parameter_of_every_preset_has_a_role(path: str) -> None:
    decoder = decoder_of(load_config(path).model)
    assert len(list(named_specs(decoder))) == len(list(decoder.parameters()))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("moepp_0.6b", 0.6), ("moepp_1b", 1.0), ("moepp_2b", 2.0), ("moepp_7b", 7.6)],
)
def test_moepp_sizes(name: str, billions: float) -> None:
    """Total parameters as the names of MoE++ round them."""
    decoder = decoder_of(load_config(REPOSITORY / "configs" / "published" / f"{name}.yaml").model)
    assert sum(p.numel() for p in decoder.parameters()) / 1e9 == pytest.approx(billions, abs=0.09)


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [
        ("mor_135m", 30, 106),
        ("mor_360m", 32, 315),
        ("mor_730m", 26, 654),
        ("mor_1.7b", 24, 1610),
    ],
)
def test_mor_shapes_unshared_have_the_published_sizes(
    name: str, layers: int, millions: float
) -> None:
    """Without sharing they are the vanilla models: non-embedding parameters of arXiv 2507.10524."""
    config = load_config(
        REPOSITORY / "configs" / "published" / f"{name}.yaml",
        [
            "model.depth.sharing=none",
            "model.depth.num_recursions=1",
            "model.depth.router=null",
        ],
    )
    assert config.model.depth.num_layers == layers
    decoder = decoder_of(config.model)
    size = sum(p.numel() for p in decoder.parameters()) - decoder.embedding.weight.numel()
    assert size / 1e6 == pytest.approx(millions, abs=0.6 if millions < 1000 else 5)


def test_mor_360m_has_the_published_unique_parameters() -> None:
    """118 M with three recursions (arXiv 2507.10524, table 3)."""
    config = load_config(REPOSITORY / "configs" / "published" / "mor_360m.yaml")
    decoder = decoder_of(config.model)
    size = sum(p.numel() for p in decoder.parameters()) - decoder.embedding.weight.numel()
    assert size / 1e6 == pytest.approx(118, abs=0.5)


def test_quickstart_is_between_five_and_ten_million_parameters() -> None:
    decoder = decoder_of(load_config(REPOSITORY / "configs" / "quickstart.yaml").model)
    assert 5e6 <= sum(p.numel() for p in decoder.parameters()) <= 10e6


def test_the_product_preset_is_both_of_its_factors() -> None:
    """moepp_mor has moepp's feed-forward and mor's depth."""
    configs = {
        name: load_config(REPOSITORY / "configs" / f"{name}.yaml").model
        for name in ("dense", "moepp", "mor", "moepp_mor")
    }
    product = configs["moepp_mor"]
    assert product.ffn == configs["moepp"].ffn != configs["dense"].ffn
    assert product.depth == configs["mor"].depth != configs["dense"].depth
    assert product.hidden_size == configs["dense"].hidden_size
