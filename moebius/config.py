"""What every room's configuration is made of: frozen, strict nodes and rules that span fields."""

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag


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


def shape_of(value: Any) -> str:
    """Tag of a value that may be written as a number, a list or a mapping.

    Chosen by its shape, a wrong value is one error and not one for each way to write it. Tags in
    parentheses are left out of the paths that errors name.
    """
    if isinstance(value, list | tuple):
        return LIST.tag
    return MAPPING.tag if isinstance(value, dict | BaseModel) else NUMBER.tag


def kind_or(default: str) -> Discriminator:
    """Chooses the member of a union by its `kind`, which a file may leave to `default`."""

    def kind_of(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("kind", default)
        return getattr(value, "kind", default)

    return Discriminator(kind_of)


NUMBER, LIST, MAPPING = Tag("(number)"), Tag("(list)"), Tag("(mapping)")
ByShape = Discriminator(shape_of)
IntPerLayer = Annotated[
    Annotated[PositiveInt, NUMBER]
    | Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1), LIST],
    ByShape,
]
"""one number for all layers, or a list with one per unique layer that routes"""
