"""moebius schema: the JSON schema of run files, for editors."""

import argparse
import json
from typing import Any

from rich.console import Console

from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import BASE_KEY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius schema > schema.json`."""


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the schema; a run file can name it for the language server of an editor."""
    schema = RunConfig.model_json_schema()
    schema["properties"][BASE_KEY] = {
        "type": "string",
        "description": "another run file, relative to this one, that this one changes",
    }
    # A file may leave to its base what a run requires, at any depth.
    for node in (schema, *schema["$defs"].values()):
        node.pop("required", None)
    console.out(json.dumps(_any_of(schema), indent=1), highlight=False)
    return 0


def _any_of(node: Any) -> Any:
    """The schema with `anyOf` for `oneOf`: a node without `kind`, which its base names, may be any
    of several."""
    if isinstance(node, dict):
        return {"anyOf" if key == "oneOf" else key: _any_of(value) for key, value in node.items()}
    return [_any_of(item) for item in node] if isinstance(node, list) else node
