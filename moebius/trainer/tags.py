"""Every number that a run publishes: its name in metrics.jsonl and TensorBoard, and what it means.

python -m moebius.trainer.tags > docs/metrics.md
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tag:
    """A name, with `<what varies>` in it, and its meaning."""

    name: str
    meaning: str
    when: str = ""
    """which runs have it; empty: all"""

    def matches(self, name: str) -> bool:
        """Whether this is the tag of a published number."""
        pattern = re.sub(r"<[^>]+>", "[^/]+", re.escape(self.name))
        return re.fullmatch(pattern, name) is not None


MOE, DEPTH = "experts", "a router over depth"
CHOICE, EXPERT_CHOICE = "tokens that choose their depth", "passes that choose their tokens"
DYNAMIC, BIASED = "a dynamic number", "controllers of a bias"
BOTH_KINDS = "zero-computation experts, a budget or balance loss"
MIXTURE, SEVERAL, EXITS = "a mixture of corpora", "several processes", "early exits"
EVALUATION, PLANNED, SINGLE = "evaluation", "`log.plan`", "a single corpus"
TAGS = (
    Tag("train/loss", "mean cross-entropy of the step in nats per token, without auxiliary losses"),
    Tag("train/bits_per_byte", "the same in bits per byte of the text of the labels"),
    Tag("train/<kind>_loss", "auxiliary loss as it enters the gradient, summed over sites", MOE),
    Tag("train/grad_norm", "of all gradients, before clipping"),
    Tag("train/param_norm", "of all trained parameters, after the step"),
    Tag("train/lr", "learning rate"),
    Tag("train/tokens", "tokens of the stream up to here, those of samples left out included"),
    Tag("train/epoch", "how often the corpus has been read", SINGLE),
    Tag("eval/loss", "validation loss, passes selecting causally as generation does", EVALUATION),
    Tag("eval/bits_per_byte", "the same in bits per byte", EVALUATION),
    Tag("eval/topk_loss", "selecting as in training, looking ahead", EXPERT_CHOICE),
    Tag("eval/topk_bits_per_byte", "the same in bits per byte", EXPERT_CHOICE),
    Tag("eval/exit_<n>_loss", "of the exit after n layer visits", EXITS),
    Tag("eval/exit_<n>_bits_per_byte", "the same in bits per byte", EXITS),
    Tag("eval/<corpus>/loss", "of a corpus alone; as are the others", MIXTURE),
    Tag("eval/<corpus>/bits_per_byte", "the same in bits per byte", MIXTURE),
    Tag("speed/tokens_per_second", "of all processes, evaluation and checkpoints left out"),
    Tag("speed/step_seconds", "mean since the last report"),
    Tag("speed/data_wait", "share of that in which the next batch was waited for"),
    Tag("speed/communication_wait", "share of that in which the first process waited for others"),
    Tag("speed/forward_seconds", "of a step, by the clock of the host"),
    Tag("speed/backward_seconds", "likewise, with what is computed again"),
    Tag("speed/optimizer_seconds", "of a step, reducing gradients, clipping, update; likewise"),
    Tag("speed/mfu", "executed FLOPs over the peak of all devices, measured in this run"),
    Tag("speed/mfu_nominal", "the same with the FLOPs that the budgets of both routings foresee"),
    Tag("speed/ffn_flops_per_token", "forward FLOPs of feed-forwards per token of the batch"),
    Tag("speed/slowest_rank", "the process that worked longest"),
    Tag("speed/slowest_over_median", "its time over the median of all"),
    Tag("memory/peak_gigabytes", "most of a process so far: allocated on CUDA, resident on a CPU"),
    Tag("memory/planned_gigabytes", "what the planner foresees, on a CPU to be added", PLANNED),
    Tag("communication/<axis>/<operation>_bytes", "sent per step by the first process", SEVERAL),
    Tag("communication/<axis>/<operation>_calls", "calls per step of the first process", SEVERAL),
    Tag("goodput/<section>", "share of the time since the beginning: steps that count, lost, down"),
    Tag("health/starts", "how often the run has begun, gone on or gone back"),
    Tag("health/skipped", "steps that changed nothing"),
    Tag("health/spikes", "steps whose loss stood out"),
    Tag("health/rewinds", "how often the run has gone back to a checkpoint"),
    Tag("health/stragglers", "reports of a process that was late twice"),
    Tag("width/computing_share", "assignments that cost matrix products, of all", MOE),
    Tag("width/target_computing_share", "what a budget or balance loss asks it to be", BOTH_KINDS),
    Tag("width/experts_per_token", "assignments per token", MOE),
    Tag("width/experts_per_token_std", "its deviation between tokens, at the worst site", MOE),
    Tag("width/tokens_with_<n>", "share of the tokens that have n experts", DYNAMIC),
    Tag("width/load_max_over_mean", "busiest computing expert over the mean, worst site", MOE),
    Tag("width/dead_share", "experts without a token", MOE),
    Tag("width/entropy", "of the scores, 1 where all are equal", MOE),
    Tag("width/dropped_share", "assignments beyond a capacity that were left out", MOE),
    Tag("width/spilled_share", "those that were sent to a zero-computation expert instead", MOE),
    Tag("width/logsumexp_rms", "size of the raw scores", MOE),
    Tag("width/bias_spread", "highest less lowest bias in selection, worst site", BIASED),
    Tag("layers/<site>/computing_share", "as in width/, of one router call site", MOE),
    Tag("layers/<site>/target_computing_share", "likewise", BOTH_KINDS),
    Tag("layers/<site>/experts_per_token", "likewise", MOE),
    Tag("layers/<site>/load_max_over_mean", "likewise", MOE),
    Tag("layers/<site>/dead_share", "likewise", MOE),
    Tag("layers/<site>/entropy", "likewise", MOE),
    Tag("layers/<site>/dropped_share", "likewise", MOE),
    Tag("layers/<site>/spilled_share", "likewise", MOE),
    Tag("layers/<site>/bias_spread", "likewise", BIASED),
    Tag("depth/selected_share_<loop>.<pass>", "selected of the candidates of a pass", DEPTH),
    Tag("depth/dead_share_<loop>.<pass>", "positions of the row that no row selected", DEPTH),
    Tag("depth/gate_<loop>.<pass>", "mean gate of selected tokens", EXPERT_CHOICE),
    Tag("depth/agreement", "how often the causal decision is that of training", EXPERT_CHOICE),
    Tag("depth/mean_passes", "made per token", CHOICE),
    Tag("depth/max_violation", "busiest depth over the mean, less 1", CHOICE),
    Tag("depth/choice_entropy", "of the depths that tokens choose, in nats", CHOICE),
    Tag("tokens/passes_of_<class>", "mean passes of the tokens that are shown, see below", DEPTH),
    Tag("tokens/experts_of_<class>", "mean chosen experts that compute, likewise", MOE),
    Tag("data/documents_per_row", "documents or parts of them in a row, which has no padding"),
    Tag("data/context_tokens", "mean number of tokens that a token may look at, itself included"),
    Tag("data/<corpus>/weight", "present weight", MIXTURE),
    Tag("data/<corpus>/share", "share of all tokens so far", MIXTURE),
)
PICTURES = (
    Tag("width/load", "router call sites x experts: blue none, white the mean, red twice it", MOE),
    Tag(
        "width/experts_per_token",
        "sites x numbers of experts: white an even share",
        DYNAMIC,
    ),
    Tag("depth/selected", "routed loops x passes: white half of the candidates, red all", DEPTH),
)
TEXTS = (
    Tag("run/config", "the configuration, defaults included; at the beginning"),
    Tag("run/program", "the Program: visits in order, and their cost; at the beginning"),
    Tag("tokens/passes", "a row, a square in the colour of its passes before each token", DEPTH),
    Tag("tokens/experts", "likewise by chosen experts that compute, of all layers and passes", MOE),
)
FINAL = ("train/loss", "eval/loss", "eval/bits_per_byte", "speed/tokens_per_second")
"""what runs are compared by beside their options, as they end"""
LAYOUT = {
    "1 training": {
        "loss": ["Multiline", ["train/loss", "eval/loss", "eval/topk_loss"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
    },
    "2 experts": {
        "load, busiest over mean": ["Multiline", ["width/load_max_over_mean"]],
        "share of experts that compute": ["Multiline", ["width/computing_share"]],
        "experts per token": ["Multiline", ["width/experts_per_token$"]],
        "dead and dropped": ["Multiline", ["width/dead_share", "width/dropped_share"]],
    },
    "3 recursion": {
        "selected share": ["Multiline", ["depth/selected_share_.*"]],
        "causal as in training": ["Multiline", ["depth/agreement"]],
        "passes per token": ["Multiline", ["depth/mean_passes"]],
    },
    "4 speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_second"]],
        "MFU, executed and nominal": ["Multiline", ["speed/mfu", "speed/mfu_nominal"]],
        "goodput": ["Multiline", ["goodput/steps", "goodput/lost", "goodput/down"]],
    },
}
"""groups and charts of TensorBoard's custom scalars, those first that a person looks at first"""


def documented(name: str) -> Tag | None:
    """What a published number is."""
    return next((tag for tag in TAGS if tag.matches(name)), None)


def table(tags: tuple[Tag, ...]) -> Iterator[str]:
    """Rows of Markdown."""
    yield "| name | meaning | runs with |"
    yield "|---|---|---|"
    for tag in tags:
        yield f"| `{tag.name}` | {tag.meaning} | {tag.when} |"


def page() -> str:
    """`docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m moebius.trainer.tags`; do not edit.",
        "",
        "All numbers are in `<run_dir>/metrics.jsonl`, one JSON object per report with its `step`,",
        "at full precision, and as scalars in `<run_dir>/tensorboard`. Reports come every",
        "`log.interval` steps; in other steps nothing is read back from a device. A site is",
        "`<layer>.<sublayer>.<pass>`; layers and loops count from 0, passes from 1.",
        "",
        *table(TAGS),
        "",
        "## Pictures",
        "",
        "Every `log.picture_interval` steps, in TensorBoard and Weights & Biases.",
        "",
        *table(PICTURES),
        "",
        "## Texts",
        "",
        "In TensorBoard; rows of tokens every `log.picture_interval` steps, and all that are shown",
        "as pages in `<run_dir>/tokens`. They are of the first samples of the step that the first",
        "process reads. A class of tokens is `word` (its beginning), `part`, `digits`, `space` or",
        "`other`.",
        "",
        *table(TEXTS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
