"""What each stage of routing over width can be. A new kind needs a file and an entry here."""

from typing import Annotated

from pydantic import Field, Tag

from moebius.config import kind_or
from moebius.model.moe.candidates import Exclude, GroupLimited, Progressive
from moebius.model.moe.controllers import (
    BiasControl,
    BudgetControl,
    PercentileControl,
    TargetKControl,
)
from moebius.model.moe.forced import Balanced, Fixed, Random, Replay
from moebius.model.moe.losses import (
    ConcentrationLoss,
    DeviceLoss,
    EntropyLoss,
    MutualInformationLoss,
    SwitchLoss,
    ZLoss,
)
from moebius.model.moe.norms import Sigmoid, Softmax
from moebius.model.moe.scorers import (
    CentroidScorerConfig,
    CosineScorerConfig,
    GRUScorerConfig,
    LinearScorerConfig,
    MLPScorerConfig,
    NoScorerConfig,
)
from moebius.model.moe.selectors import All, EntropyHybrid, PercentileRow, Threshold, TopK, TopP
from moebius.model.moe.weights import DropNullRenormalize, Ones, Raw, Renormalize

AnyScorer = Annotated[
    LinearScorerConfig
    | MLPScorerConfig
    | CosineScorerConfig
    | CentroidScorerConfig
    | GRUScorerConfig
    | NoScorerConfig,
    Field(discriminator="kind"),
]
AnyNorm = Annotated[
    Annotated[Softmax, Tag("softmax")] | Annotated[Sigmoid, Tag("sigmoid")], kind_or("softmax")
]
AnyWeights = Annotated[
    Annotated[Raw, Tag("raw")]
    | Annotated[Renormalize, Tag("renormalize")]
    | Annotated[DropNullRenormalize, Tag("drop_null_renormalize")]
    | Annotated[Ones, Tag("ones")],
    kind_or("raw"),
]
AnyCandidates = Annotated[GroupLimited | Progressive | Exclude, Field(discriminator="kind")]
AnySelector = Annotated[
    TopK
    | TopP
    | Threshold
    | PercentileRow
    | EntropyHybrid
    | All
    | Random
    | Balanced
    | Fixed
    | Replay,
    Field(discriminator="kind"),
]
AnyLoss = Annotated[
    SwitchLoss | DeviceLoss | MutualInformationLoss | ConcentrationLoss | EntropyLoss | ZLoss,
    Field(discriminator="kind"),
]
AnyController = Annotated[
    BiasControl | BudgetControl | TargetKControl | PercentileControl,
    Field(discriminator="kind"),
]
