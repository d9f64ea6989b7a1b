"""What every room's configuration is made of: frozen, strict nodes and rules that span fields."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class ConfigNode(BaseModel):
    """A node of the configuration tree: immutable, strict, its field docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Problem(NamedTuple):
    """One finding of a rule: the dotted path of the field to blame and what is wrong with it."""

    path: str
    message: str
