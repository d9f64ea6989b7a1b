"""Reading run files: composition, overrides, and messages that say where and what to do."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from moebius.errors import ConfigError
from moebius.trainer.config import RunConfig, identity, problems
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import REPOSITORY, moebius, write_config

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def messages(path: Path, *overrides: str) -> list[str]:
    """The lines of the ConfigError that a file and overrides cause."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def file_with(tmp_path: Path, text: str) -> Path:
    """A run file on top of the quickstart."""
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {QUICKSTART}\n{text}")
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=str)
def test_every_preset_is_valid(path: Path) -> None:
    load_config(path)


def test_unknown_key_names_place_path_and_nearest_key(tmp_path: Path) -> None:
    path = file_with(tmp_path, "model:\n  hiden_size: 256\n")
    (line,) = messages(path)
    assert line == f"{path}:3:3: model.hiden_size: unknown option; did you mean hidden_size?"


def test_wrong_type_names_the_value(tmp_path: Path) -> None:
    path = file_with(tmp_path, "model:\n  depth: {num_layers: twelve}\n")
    (line,) = messages(path)
    assert line.startswith(f"{path}:3:11: model.depth.num_layers: ")
    assert line.endswith("valid integer, got 'twelve'")


def test_numbers_in_quotes_are_no_numbers() -> None:
    """No silent conversion."""
    (line,) = messages(QUICKSTART, "model.hidden_size='256'")
    assert line.endswith("got '256'")


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    path = file_with(tmp_path, "optim: {lr: -1, btas: [0.9, 0.95]}\ntrain: {num_steps: 0}\n")
    assert len(messages(path, "log.intervall=3")) == 4


def test_wrong_choice_suggests_the_nearest(tmp_path: Path) -> None:
    path = file_with(tmp_path, "model:\n  depth: {sharing: middle-cycle}\n")
    assert messages(path)[0].endswith("'middle-cycle' is not allowed; did you mean middle_cycle?")
    path = file_with(tmp_path, "data: {source: {kind: file}}\n")
    assert messages(path)[0].endswith(
        "data.source.kind: 'file' is not allowed; did you mean files?"
    )


def test_errors_inside_a_chosen_kind_name_the_plain_path() -> None:
    """Pydantic's locations contain the tag of the union; a user's file does not."""
    (line,) = messages(QUICKSTART, "model.ffn.experts.0.cont=4")
    assert line == (
        "command line: model.ffn.experts.0.cont=4: model.ffn.experts.0.cont: "
        "unknown option; did you mean count?"
    )


def test_missing_option_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/x\nmodel: {}\n")
    assert f"{path}:2:1: model.vocab_size: missing" in messages(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", "not valid YAML"),
        ("- 1\n", "is a mapping, not a list"),
        ("log: {interval: 1}\nlog: {interval: 2}\n", ":2:1: log: given twice"),
        ("base: [a, b]\n", "base: must be the name of one file"),
        ("base: missing.yaml\n", "missing.yaml: cannot read the config file"),
        ("base: run.yaml\n", "the file is its own base"),
        ("a: &x {b: *x}\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (line,) = messages(path)
    assert message in line


def test_missing_file_is_named() -> None:
    (line,) = messages(Path("nowhere.yaml"))
    assert line == "nowhere.yaml: cannot read the config file: No such file or directory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "'optim.lr' is not of the form path.to.option=value"),
        ("optim.lr=[1", "optim.lr: '[1' is not a YAML value"),
        ("model.ffn.experts.9.count=1", "there is no item 9 to change"),
        ("model.²=3", "model.²: unknown option"),
        ("model=3", "model: must be a mapping of options, got 3"),
        ("run_dir.x=1", "run_dir: input should be a valid string"),
        ("optim.betas=[1.5, 0.9]", "optim.betas.0: input should be less than 1, got 1.5"),
        ("data.source={kind: files, paths: a}", "data.source.paths: must be a list, got 'a'"),
        ("optim.lr=0", "optim.lr: input should be greater than 0, got 0"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    (line,) = messages(QUICKSTART, override)
    assert line.startswith("command line: ")
    assert message in line


def test_overrides_change_nested_values_and_list_items() -> None:
    config = load_config(
        QUICKSTART, ["optim.lr=3e-4", "model.ffn.experts.0.count=2", "train.micro_batch_size=null"]
    )
    assert config.optim.lr == 3e-4
    assert config.model.ffn.experts[0].count == 2  # type: ignore[union-attr]
    assert config.train.micro_batch_size is None


@pytest.mark.parametrize(
    "override",
    [
        "model.attention.kind=standard",  # the file leaves these two to their default
        "model.depth.router.kind=expert_choice",
        "model.ffn.router.losses.0.kind=switch",
        "model.ffn.router.selector.kind=top_k",
    ],
)
def test_naming_the_kind_that_is_there_keeps_its_options(override: str) -> None:
    assert load_config(QUICKSTART, [override]) == load_config(QUICKSTART)


def test_the_order_of_overrides_does_not_matter() -> None:
    overrides = ["data.source.paths=[a.txt]", "data.source.kind=files"]
    assert load_config(QUICKSTART, overrides) == load_config(QUICKSTART, overrides[::-1])


def test_a_date_is_text() -> None:
    assert load_config(QUICKSTART, ["run_dir=2024-01-05"]).run_dir == "2024-01-05"


def test_base_is_merged_and_another_kind_replaces(tmp_path: Path) -> None:
    path = file_with(tmp_path, "model:\n  ffn: {kind: dense, intermediate_size: 64}\n")
    config = load_config(path)
    assert config.model.ffn.model_dump() == {"kind": "dense", "intermediate_size": 64}
    assert config.model.hidden_size == load_config(QUICKSTART).model.hidden_size


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"model.attention.num_kv_heads": 3}, "model.attention.num_kv_heads", "allowed: 1, 2, 4"),
    ({"model.depth.num_layers": 7}, "model.depth.num_layers", "nearest that can: 6, 8"),
    ({"model.depth.num_layers": 2}, "model.depth.num_layers", "nearest that can: 4, 6"),
    ({"model.depth.sharing": "none"}, "model.depth.num_recursions", "sharing is none"),
    ({"model.depth.sharing": "sequence"}, "model.depth.router", "needs sharing cycle"),
    ({"model.depth.router.capacities": [1.0]}, "model.depth.router.capacities", "1 capacities"),
    ({"model.depth.router.capacities": [1.0, 2.0]}, "model.depth.router.capacities", "(0, 1]"),
    (
        {"model.depth.router.capacities": [0.5, 0.6]},
        "model.depth.router.capacities",
        "must not increase",
    ),
    (
        {"model.ffn.router.selector": {"kind": "top_k", "top_k": 9}},
        "model.ffn.router.selector.top_k",
        "9 experts per token, but 8 to choose from (the pool has 8)",
    ),
    (
        {"model.ffn.experts": [{"kind": "ffn", "count": 2}]},
        "model.ffn.experts.0.intermediate_size",
        "missing",
    ),
    (
        {"model.ffn.experts": [{"kind": "zero", "intermediate_size": 8}]},
        "model.ffn.experts.0.intermediate_size",
        "a zero expert has no width",
    ),
    ({"model.ffn.experts": [{"kind": "zero"}]}, "model.ffn.experts", "nothing is computed"),
    (
        {"data.tokenizer": {"path": "t.json", "vocab_size": 300}},
        "data.tokenizer.vocab_size",
        "remove one of the two",
    ),
    ({"data.tokenizer.vocab_size": 600}, "data.tokenizer.vocab_size", "do not fit"),
    ({"model.vocab_size": 100}, "model.vocab_size", "allowed: >= 257"),
    ({"train.micro_batch_size": 3}, "train.micro_batch_size", "does not divide"),
    (
        {"data.source": {"kind": "files", "paths": []}},
        "data.source.paths",
        "give at least one file",
    ),
    (
        {"optim.schedule": {"kind": "wsd", "warmup_steps": 4, "decay_fraction": 0.5}},
        "optim.schedule.decay_fraction",
        "begins the decay at step 3",
    ),
    ({"optim.schedule.warmup_steps": 6}, "optim.schedule.warmup_steps", "allowed: less"),
    ({"profile": {"steps": [3, 7]}}, "profile.steps", "allowed: a first and a last step of 1 to"),
    ({"profile": {"steps": [4, 3]}}, "profile.steps", "in this order"),
]


@pytest.mark.parametrize(("changes", "path", "message"), RULES, ids=lambda value: str(value)[:60])
def test_rules_across_fields(
    run_tree: dict[str, Any], changes: dict[str, Any], path: str, message: str
) -> None:
    """Each rule fires for its field, and the unchanged tree satisfies all."""
    assert list(problems(RunConfig.model_validate(run_tree))) == []
    tree = json.loads(json.dumps(run_tree))
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    found = {problem.path: problem.message for problem in problems(RunConfig.model_validate(tree))}
    assert message in found[path]


def test_rules_are_reported_with_their_place(tmp_path: Path) -> None:
    path = file_with(tmp_path, "model:\n  depth:\n    num_layers: 7\n")
    (line,) = messages(path)
    assert line.startswith(f"{path}:4:5: model.depth.num_layers: 7 layers cannot be 2 recursions")


def test_a_resolved_config_round_trips(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """What a run folder keeps is a complete run file."""
    config = RunConfig.model_validate(run_tree)
    again = load_config(write_config(config.model_dump(mode="json"), tmp_path / "resolved.yaml"))
    assert again == config


def test_identity_leaves_out_what_reports_or_places_the_run(run_tree: dict[str, Any]) -> None:
    """The corpus is compared by content; the micro-batch only where a loss depends on it."""
    config = RunConfig.model_validate(run_tree)
    train = run_tree["train"]
    same = [
        {"run_dir": "elsewhere"},
        {"log": {"interval": 7}, "checkpoint": {"keep": 9}},
        {"data": run_tree["data"] | {"dir": "elsewhere"}},
        {"train": train | {"device": "auto", "micro_batch_size": 4}},
    ]
    for changes in same:
        assert identity(RunConfig.model_validate(run_tree | changes)) == identity(config)
    other = [
        {"optim": {"lr": 2e-2}},
        {"train": train | {"num_steps": 7}},
        {"data": run_tree["data"] | {"sequence_length": 31}},
    ]
    for changes in other:
        assert identity(RunConfig.model_validate(run_tree | changes)) != identity(config)
    tree = json.loads(json.dumps(run_tree))
    tree["model"]["ffn"]["router"]["losses"][0]["scope"] = "micro_batch"
    published = identity(RunConfig.model_validate(tree))
    tree["train"]["micro_batch_size"] = 4
    assert identity(RunConfig.model_validate(tree)) != published


def test_config_is_immutable(run_config: RunConfig) -> None:
    with pytest.raises(ValidationError):
        run_config.model.hidden_size = 3  # type: ignore[misc]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    result = moebius("schema")
    assert result.returncode == 0
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_schema_describes_every_option(schema: dict[str, Any]) -> None:
    """Editors get names, choices and help from the same source as the checks."""
    router = schema["$defs"]["ExpertChoiceConfig"]["properties"]
    assert router["gating"]["enum"] == ["weighted", "additive"]
    for name, node in schema["$defs"].items():
        assert node.get("description"), f"{name} has no help"
        for option, field in node["properties"].items():
            if option == "kind" or "$ref" in field or "oneOf" in field:
                continue  # explained by the node it names
            members = [member for member in field.get("anyOf", []) if "$ref" in member]
            assert field.get("description") or members, f"{name}.{option} has no help"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=str)
def test_schema_accepts_every_preset(schema: dict[str, Any], path: Path) -> None:
    """As an editor sees the file, without its base."""
    text = re.sub(r"(?<![.\d])(\d+)e-", r"\1.0e-", path.read_text())  # plain YAML 1.1
    jsonschema.validate(yaml.safe_load(text), schema)


def test_schema_refuses_what_the_checks_refuse(schema: dict[str, Any]) -> None:
    for tree in ({"modle": {}}, {"model": {"depth": {"sharing": "x"}}}, {"optim": {"lr": -1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree, schema)
