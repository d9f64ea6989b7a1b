"""What differs between the uses of one layer: norms, gains, adapters, routers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import DepthContext, StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.parameters import RMSNorm, Role, named_specs
from moebius.model.program import Site, Visit
from tests.model.recursion.systems import (
    DENSE,
    MOE,
    SYSTEMS,
    depth,
    documents,
    expert,
    moe,
    system,
    token,
)

TWO = {"num_layers": 8, "sharing": "middle_cycle", "num_recursions": 3}


def norms(executor: LocalExecutor) -> dict[tuple[str, int], list[tuple[Tensor, Tensor]]]:
    """By sublayer and unrolled number from 1, the input and output of each norm of a pass."""
    seen: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    layers = executor.decoder.layers

    def watch(name: str, layer: str) -> None:
        module = getattr(layers[layer], name)
        inner = type(module).at

        def at(x: Tensor, ctx: DepthContext) -> Tensor:
            y: Tensor = inner(module, x, ctx)
            seen.setdefault((name, ctx.visit.index + 1), []).append((x, y))
            return y

        module.at = at

    for layer in layers:
        for name in ("attention_norm", "ffn_norm"):
            watch(name, layer)
    with torch.no_grad():
        executor.hidden(documents(2, 10), StepContext("topk", Ledger()))
    return seen


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm by its formula."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps) ** -0.5 * weight


@pytest.mark.parametrize("router", [None, expert(), token()])
@pytest.mark.parametrize("scaling", ["none", "unrolled", "unique"])
def test_norms_are_divided_by_the_root_of_the_layers_number(
    scaling: str, router: dict[str, Any] | None
) -> None:
    """Both norms in front of sublayers at every visit: 1 / sqrt(l), l from 1."""
    executor = system(layer_norm_scaling=scaling, depth=TWO | {"router": router})
    seen = norms(executor)
    unique = [1, 2, 3, 2, 3, 2, 3, 4]
    assert len(seen) == 16
    for (name, number), ((x, y),) in seen.items():
        layer = str(unique[number - 1] - 1)
        weight = getattr(executor.decoder.layers[layer], name).weight
        divisor = {"none": 1, "unrolled": number, "unique": unique[number - 1]}[scaling]
        expected = rms(x, weight, 1e-5) / divisor**0.5
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", ["unrolled", "unique"])
def test_the_final_norm_is_not_scaled(scaling: str) -> None:
    executor = system(layer_norm_scaling=scaling, depth=TWO)
    assert type(executor.decoder.norm) is RMSNorm
    batch = documents(2, 10)
    inputs: list[Tensor] = []
    executor.decoder.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    got = executor.hidden(batch, StepContext("topk", Ledger()))
    expected = rms(inputs[0], executor.decoder.norm.weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_scaling_has_no_state_and_starts_with_one() -> None:
    """The same parameters; a model of one layer is what it is without."""
    names = [set(system(layer_norm_scaling=s, depth=TWO).decoder.state_dict()) for s in SCALINGS]
    assert names[0] == names[1] == names[2]
    batch, step = documents(2, 10), StepContext("topk", Ledger())
    one = [system(layer_norm_scaling=s, depth={"num_layers": 1}) for s in SCALINGS]
    states = [executor.hidden(batch, step) for executor in one]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


SCALINGS = ("none", "unrolled", "unique")
PER_DEPTH = ("gain", "down", "up", "magnitude")


@pytest.mark.parametrize("name", ["lora", "dora", "gain"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_entry_of_an_adapter_belongs_to_one_pass(name: str, number: int) -> None:
    """Changing entry r changes nothing in front of pass r of its layer, and something behind."""
    fields = SYSTEMS[name]["depth"]["adapter"]
    executor = system(depth=depth(2, 2, adapter=fields), ffn=DENSE)
    batch, step = documents(2, 10), StepContext("topk", Ledger())
    exits = executor.program.exits
    before = executor.exit_hiddens(batch, executor.tokens(batch), step, exits)
    with torch.no_grad():
        for parameter_name, parameter in executor.decoder.named_parameters():
            if parameter_name.startswith("layers.2.") and parameter_name.endswith(PER_DEPTH):
                assert len(parameter) == 2
                parameter[number - 1] += 0.5
    after = executor.exit_hiddens(batch, executor.tokens(batch), step, exits)
    first = {1: 3, 2: 5}[number]  # 0, 1 2, 1 2, 3: visits until layer 2 is done for that time
    for count in exits:
        assert torch.equal(before[count], after[count]) == (count < first), count


def test_layers_of_their_own_have_no_adapter() -> None:
    """What is used once differs from nothing."""
    specs = list(named_specs(system(**SYSTEMS["dora"]).decoder))
    adapted = {name.split(".")[1] for name, _, s in specs if s.role in (Role.ADAPTER, Role.GAIN)}
    assert adapted == {"1", "2"}


def routers_of(executor: LocalExecutor, layer: str) -> Any:
    """The routers of a layer's feed-forward."""
    return executor.decoder.layers[layer].ffn.routers


def scores_at(executor: LocalExecutor, layer: str) -> list[tuple[Visit, Any]]:
    """Which router object is asked at which visit of a layer."""
    asked: list[tuple[Visit, Any]] = []
    for router in routers_of(executor, layer):
        router.register_forward_pre_hook(lambda module, args: asked.append((args[2].visit, module)))
    with torch.no_grad():
        executor.hidden(documents(2, 10), StepContext("topk", Ledger()))
    return asked


@pytest.mark.parametrize("per_depth", [False, True])
@pytest.mark.parametrize("router", [None, expert(), token()])
def test_which_router_serves_which_pass(per_depth: bool, router: dict[str, Any] | None) -> None:
    """With per_depth the r-th at pass r, else the one at all passes; a layer of its own has one."""
    executor = system(ffn=moe(per_depth, "prev_layer"), depth=depth(3, 2, router=router))
    for layer, times in (("0", 1), ("1", 3), ("2", 3), ("3", 1)):
        routers = routers_of(executor, layer)
        assert len(routers) == (times if per_depth else 1)
        asked = scores_at(executor, layer)
        assert [visit.depth for visit, _ in asked] == list(range(1, times + 1))
        for visit, module in asked:
            assert module is routers[visit.depth - 1 if per_depth else 0]


@pytest.mark.parametrize("kind", ["prev_layer", "prev_depth"])
@pytest.mark.parametrize("per_depth", [False, True])
def test_where_residual_matrices_exist(kind: str, per_depth: bool) -> None:
    """W_g only where some visit has a router before it: else it would never learn."""
    names = dict(system(ffn=moe(per_depth, kind), depth=depth(2, 2)).decoder.named_parameters())
    have = {name.removesuffix(".scorer.residual") for name in names if name.endswith("residual")}
    expected = set()
    for layer, times in (("0", 1), ("1", 2), ("2", 2), ("3", 1)):
        for number in range(times if per_depth else 1):
            last_pass = number + 1 if per_depth else times
            follows = last_pass > 1 if kind == "prev_depth" else layer != "0"
            if follows:
                expected.add(f"layers.{layer}.ffn.routers.{number}")
    assert have == expected


@pytest.mark.parametrize("per_depth", [False, True])
@pytest.mark.parametrize("router", [None, expert(), token()])
def test_statistics_and_controllers_belong_to_passes(
    per_depth: bool, router: dict[str, Any] | None
) -> None:
    """A site for each layer and pass, with the tokens of that pass; its bias moves by the counts of
    that site alone."""
    ffn = MOE | {"router": MOE["router"] | {"per_depth": per_depth, "losses": []}}
    executor = system(ffn=ffn, depth=depth(3, 2, router=router))
    ledger = executor.accumulate_gradients([documents(3, 12)]).ledger
    executor.decoder.update_routers(ledger, 0)
    state = executor.decoder.state_dict()
    places = [("0", 1)] + [(layer, r) for r in (1, 2, 3) for layer in ("1", "2")] + [("3", 1)]
    sites = {s: v for s, v in ledger.statistics.items() if s.module.endswith("ffn")}
    assert list(sites) == [Site(f"layers.{layer}.ffn", r) for layer, r in places]
    tokens = []
    for layer, r in places:
        sums = sites[Site(f"layers.{layer}.ffn", r)]
        counts = sums["expert_tokens"].tolist()
        assert sum(counts) == 2 * int(sums["tokens"])
        entered = 36
        if router is not None and layer in "12":
            entered = int(ledger.statistics[Site("depth.0", r)]["selected"])
        assert int(sums["tokens"]) == entered
        tokens.append(entered)
        mean = sum(counts) / len(counts)
        expected = [0.01 * ((n < mean) - (n > mean)) for n in counts]
        number, use = (r - 1, 0) if per_depth else (0, r - 1)
        name = f"layers.{layer}.ffn.routers.{number}.controllers.0.bias_UN"
        rows = 1 if per_depth or layer in "03" else 3
        assert state[name].shape == (rows, 5)
        assert state[name][use].tolist() == pytest.approx(expected, abs=1e-7)
    assert len(set(tokens)) > 1 or router is None


@pytest.mark.parametrize("per_depth", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_bias_steers_its_own_pass(number: int, per_depth: bool) -> None:
    """A bias that decides for all tokens does so at one pass of one layer."""
    ffn = MOE | {"router": MOE["router"] | {"per_depth": per_depth}}
    executor = system(ffn=ffn, depth=depth(3, 2))
    router = routers_of(executor, "1")[number - 1 if per_depth else 0]
    use = 0 if per_depth else number - 1
    router.controllers[0].bias_UN[use] = torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0])
    ledger = Ledger()
    with torch.no_grad():
        executor.hidden(documents(3, 12), StepContext("topk", ledger))
    sites = [site for site in ledger.statistics if site.module.endswith("ffn")]
    assert len(sites) == 8
    for site in sites:
        counts = ledger.statistics[site]["expert_tokens"].tolist()
        is_steered = site == Site("layers.1.ffn", number)
        assert (counts == [0, 36, 0, 36, 0]) == is_steered, site
