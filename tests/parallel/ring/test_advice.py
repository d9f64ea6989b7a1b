"""Prices of layouts, what is recommended, and pictures of plans."""

import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.parallel.config import RingConfig
from moebius.parallel.ring.advice import STATE, Job, Machine, Price, prices, recommend
from moebius.parallel.ring.executor import plan_ring
from moebius.parallel.ring.picture import WIDTH, characters, svg
from moebius.parallel.ring.slices import cut_ring
from moebius.parallel.ring.timeline import Stop, plan
from tests.conftest import model_tree
from tests.trainer.helpers import REPOSITORY, moebius

DEPTH = {"num_layers": 14, "sharing": "middle_cycle", "num_recursions": 3, "router": {}}
DENSE = {"kind": "dense", "intermediate_size": 96}
JOB = Job(num_ranks=4, num_micro_batches=16, rows=2, row_length=64)
MACHINE = Machine(flops_per_byte=1.0, memory=80e9)


def decoder_of(**changes: Any) -> Decoder:
    """A model without numbers: four shared layers in three passes."""
    tree = model_tree(**({"ffn": DENSE, "depth": DEPTH} | changes))
    with torch.device("meta"):
        return Decoder(ModelConfig.model_validate(tree))


def by_name(
    decoder: Decoder, machine: Machine = MACHINE, job: Job = JOB, **ring: Any
) -> dict[str, Price]:
    """The price of each layout."""
    found = prices(decoder, job, machine, RingConfig(**ring))
    return {price.name: price for price in found}


def test_a_ring_holds_its_slice_and_the_ends() -> None:
    decoder = decoder_of()
    of_layer = sum(p.numel() for p in decoder.layers["1"].parameters())
    whole = sum(p.numel() for p in decoder.parameters())
    ring = by_name(decoder)["ring"]
    assert ring.state_bytes == STATE * (whole - 3 * of_layer)
    share = 1 + 2 / 3 + 1 / 3
    stream = 4 * 2 * 64 * 32
    ends = whole - 4 * of_layer
    messages = 2 * stream * share * (4 + 1 - 2 / 4) * 16 / 4
    assert ring.sent_bytes == pytest.approx(messages + 2 * 3 / 4 * 4 * ends)


def test_prices_of_the_others() -> None:
    decoder = decoder_of()
    whole = sum(p.numel() for p in decoder.parameters())
    found = by_name(decoder)
    assert list(found) == ["fsdp2", "pipeline", "ring"], "no experts to share out"
    assert found["fsdp2"].sent_bytes == 3 * 4 * whole * 3 / 4 * 4
    assert found["fsdp2"].bubble == 0
    assert found["pipeline"].bubble >= 3 / 16
    experts = by_name(decoder_of(ffn=model_tree()["ffn"]))["experts"]
    assert experts.options == "ep: 4"
    assert "experts" not in by_name(decoder_of(ffn=model_tree()["ffn"]), job=Job(3, 16, 2, 64))


def test_recomputation_trades_time_for_memory() -> None:
    decoder = decoder_of()
    kept, again = by_name(decoder, recompute=False)["ring"], by_name(decoder)["ring"]
    assert again.activation_bytes < kept.activation_bytes / 2
    assert 1.1 < again.time / kept.time < 4 / 3 + 0.1


def test_what_is_recommended() -> None:
    decoder = decoder_of()
    found = prices(decoder, JOB, MACHINE, RingConfig())
    best, reasons = recommend(found, JOB, MACHINE)
    assert best.name == "fsdp2", "it waits for nobody"
    assert [reason.partition(" ")[0] for reason in reasons] == ["pp:", "rp:", "the"]

    slow = Machine(flops_per_byte=1e5, memory=80e9)
    found = prices(decoder, JOB, slow, RingConfig())
    best, _ = recommend(found, JOB, slow)
    assert best.name != "fsdp2", "gathers would take longer than products"

    tight = Machine(1.0, memory=1.01 * by_name(decoder)["ring"].memory)
    found = prices(decoder, JOB, tight, RingConfig())
    best, reasons = recommend(found, JOB, tight)
    assert best.name == "ring"
    assert any(reason.startswith("data: fsdp2 needs 0.0 GB of 0.0 GB") for reason in reasons)

    none = Machine(1.0, memory=1.0)
    best, reasons = recommend(found, JOB, none)
    assert best.memory == min(price.memory for price in found)
    assert reasons[0].startswith("none fits into")


@pytest.mark.parametrize(("live", "verdict"), [(1, "more"), (16, "less")])
def test_a_ring_is_not_said_to_wait_less_where_it_does_not(live: int, verdict: str) -> None:
    """Idle time over what has to be computed, of which recomputation is no part."""
    decoder = decoder_of()
    found = prices(decoder, JOB, MACHINE, RingConfig(live=live))
    _, reasons = recommend(found, JOB, MACHINE)
    ring = cut_ring(decoder, 4, 64)
    timeline = plan_ring(ring, RingConfig(live=live), 16)
    worked = sum(event.end - event.start for event in timeline.events)
    idle = timeline.makespan * 4 - worked
    once = plan_ring(ring, RingConfig(live=live, recompute=False), 16)
    needed = sum(event.end - event.start for event in once.events)
    assert worked > needed
    assert (idle / needed < 3 / 16) == (verdict == "less")
    assert reasons[-1].startswith(f"the ring waits {idle / needed:.1%} of its work, {verdict} than")
    assert "than the 18.8% of 1F1B over unrolled stages" in reasons[-1]


def test_the_others_may_recompute_too() -> None:
    decoder = decoder_of()
    plain = by_name(decoder)["fsdp2"]
    again = by_name(decoder, job=replace(JOB, recompute="full"))["fsdp2"]
    assert again.time == pytest.approx(4 / 3 * plain.time)
    assert again.activation_bytes < plain.activation_bytes / 4


def test_slices_are_cut_by_cost() -> None:
    ring = cut_ring(decoder_of(), 2, 64)
    assert ring.slices == (("1", "2"), ("3", "4"))
    assert len(ring.costs.slices) == 3
    assert ring.costs.slices[0][0] > ring.costs.slices[1][0] > ring.costs.slices[2][0]
    measured = [1.0, 6.0, 2.0, 2.0, 2.0, 1.0, 4.0]  # of six layers and the head
    ring = cut_ring(decoder_of(), 2, 64, measured)
    assert ring.slices == (("1",), ("2", "3", "4"))
    assert ring.costs.slices == ((6.0, 6.0), (4.0, 4.0), (2.0, 2.0))
    assert (ring.costs.front, ring.costs.back) == (1.0, 5.0)
    with pytest.raises(ValueError, match="a ring needs one loop"):
        cut_ring(
            decoder_of(depth={"num_layers": 4, "sharing": "sequence", "num_recursions": 2}), 2, 64
        )


def test_merged_chunks_have_as_many_tokens() -> None:
    ring = cut_ring(decoder_of(), 2, 64)
    timeline = plan_ring(ring, RingConfig(merge=True), 3)
    chunks = [stop.num_chunks for stop in timeline.ways[0] if not stop.is_home]
    assert chunks == [3, 3, 2, 2, 1, 1]
    single = plan_ring(ring, RingConfig(), 9)
    assert sum(e.end - e.start for e in timeline.events) == pytest.approx(
        sum(e.end - e.start for e in single.events)
    )


def test_a_timeline_of_characters() -> None:
    way = (Stop(0, 1.0, 2.0), Stop(1, 1.0, 2.0))
    lines = list(characters(plan([way], 2, 1), 6))
    assert lines == ["rank 0 |0...AA|", "rank 1 |.0AA..|"]


def test_a_timeline_as_svg() -> None:
    ring = cut_ring(decoder_of(), 4, 64)
    timeline = plan_ring(ring, RingConfig(), 8)
    root = ET.fromstring(svg(timeline))
    bars = [e for e in root if e.tag.endswith("rect") and "hsl" in e.attrib["fill"]]
    assert len(bars) == len(timeline.events)
    rows = Counter(bar.attrib["y"] for bar in bars)
    assert sorted(rows.values()) == sorted(len(timeline.of(rank)) for rank in range(4))
    assert max(float(b.attrib["x"]) + float(b.attrib["width"]) for b in bars) == pytest.approx(
        48 + WIDTH, abs=0.2
    )


PAGE = REPOSITORY / "docs" / "recursion-parallelism.md"


def test_describe_draws_the_picture_of_the_page(tmp_path: Path) -> None:
    """By the command that stands under it."""
    (command,) = [line.strip() for line in PAGE.read_text().splitlines() if "--timeline" in line]
    words = command.split()[1:-1]
    result = moebius(*words, str(tmp_path / "ring.svg"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ring.svg").read_text() == (PAGE.parent / "ring.svg").read_text()
    assert "slice 3 on rp 3: layers 10, 11, 12, 3 passes" in result.stdout
    assert "rank 3 |" in result.stdout
    assert "recommended: parallel " in result.stdout


def test_describe_plans_joined_micro_batches() -> None:
    """As many passes as there are, as many micro-batches are one."""
    changes = ["train.batch_size=12", "train.micro_batch_size=1", "parallel.rp=2"]
    result = moebius("describe", "configs/moepp_mor.yaml", *changes, "parallel.ring.merge=true")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank ")]
    assert set("".join(line.partition("|")[2] for line in lines)) & set("456789") == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeline", "x.svg"], "--timeline: parallel.rp is 1, so there is no ring"),
        (["--processes", "1"], "--processes: 1; allowed: 2 and more - leave it out"),
        (
            ["--processes", "9"],
            "--processes: 9, but the block that is repeated has 4 layers to cut - try",
        ),
    ],
)
def test_describe_refuses_what_it_cannot_draw(options: list[str], message: str) -> None:
    config = "configs/moepp_mor.yaml"
    changes = ["model.depth.num_layers=14"]
    result = moebius("describe", config, *changes, *options)
    assert (result.returncode, result.stdout) == (5, "")
    assert message in result.stderr
