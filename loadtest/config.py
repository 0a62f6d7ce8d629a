"""RunConfig: one frozen, validated object that describes a load test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from expertmesh.config import Section
from expertmesh.wire.tls import TlsFiles
from expertmesh.yaml_file import read_model

Seconds = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Instant = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, pydantic.Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Weight = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
StageName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][-_.A-Za-z0-9]{0,39}$")]


class FixedLength(Section):
    kind: Literal["fixed"]
    value: int = pydantic.Field(ge=1)


class UniformLength(Section):
    kind: Literal["uniform"]
    low: int = pydantic.Field(ge=1)
    high: int = pydantic.Field(ge=1)

    @pydantic.model_validator(mode="after")
    def ascends(self) -> UniformLength:
        if self.high < self.low:
            raise ValueError(f"high {self.high} < low {self.low}")
        return self


class LognormalLength(Section):
    kind: Literal["lognormal"]
    median: float = pydantic.Field(ge=1, allow_inf_nan=False)
    sigma: float = pydantic.Field(ge=0, le=5, description="Standard deviation of the logarithm.")
    low: int = pydantic.Field(1, ge=1, description="Shorter draws are raised to this.")
    high: int = pydantic.Field(1_000_000, ge=1, description="Longer draws are cut to this.")

    @pydantic.model_validator(mode="after")
    def median_is_possible(self) -> LognormalLength:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"median {self.median:g} is not between low {self.low} and high {self.high}")
        return self


class FileLength(Section):
    kind: Literal["file"]
    path: Path = pydantic.Field(description="One whole number per line; drawn with replacement.")


Length = Annotated[FixedLength | UniformLength | LognormalLength | FileLength, pydantic.Field(discriminator="kind")]


class Wave(Section):
    """A day's curve: the rate is multiplied by 1 + amplitude * sin(2 pi (t / period_s + phase))."""

    amplitude: float = pydantic.Field(gt=0, le=1)
    period_s: Seconds
    phase: float = pydantic.Field(0, description="Periods; -0.25 begins at the lowest point.")


class OpenArrivals(Section):
    """Arrivals that wait for nobody; the rate may run from `rate` to `to_rate` and follow a wave."""

    rate: Rate = pydantic.Field(description="Sessions (single requests, or dispatches) per second.")
    to_rate: Rate | None = pydantic.Field(None, description="Rate at the stage's end; default: no ramp.")
    wave: Wave | None = None


class PoissonArrivals(OpenArrivals):
    kind: Literal["poisson"]


class GammaArrivals(OpenArrivals):
    kind: Literal["gamma"]
    burstiness: float = pydantic.Field(
        gt=0, le=1000, description="Shape of the gaps, as vLLM's --burstiness: 1 is Poisson, less comes in bursts."
    )


class ConstantArrivals(OpenArrivals):
    kind: Literal["constant"]


class TraceArrivals(Section):
    """Times and lengths from a file; lengths replace the workload's."""

    kind: Literal["trace"]
    path: Path
    format: Literal["mooncake", "burstgpt"]
    speed: float = pydantic.Field(1, gt=0, allow_inf_nan=False, description="2 replays twice as fast.")
    start_s: Instant = pydantic.Field(0, description="Of the trace's time; what is earlier is left out.")
    max_requests: int | None = pydantic.Field(None, ge=1)


class ClosedArrivals(Section):
    """N users, each of whom waits for an answer before the next request; queueing is hidden, by its nature."""

    kind: Literal["closed"]
    users: int = pydantic.Field(ge=1, le=100_000)
    think_s: float = pydantic.Field(0, ge=0, allow_inf_nan=False, description="Pause between answer and next session.")


Arrivals = Annotated[
    PoissonArrivals | GammaArrivals | ConstantArrivals | TraceArrivals | ClosedArrivals,
    pydantic.Field(discriminator="kind"),
]


class Stage(Section):
    name: StageName
    arrivals: Arrivals
    duration_s: Seconds | None = pydantic.Field(None, description="Only a trace knows its own.")
    measured: bool = pydantic.Field(True, description="false: a warm-up, left out of the figures.")

    @pydantic.model_validator(mode="after")
    def duration_is_known(self) -> Stage:
        if self.duration_s is None and self.arrivals.kind != "trace":
            raise ValueError("duration_s: is missing")
        return self


class OpenAITarget(Section):
    """Any OpenAI-compatible endpoint; give `url`, or `cluster` for one that `expertmesh up` started."""

    kind: Literal["openai"]
    url: str | None = pydantic.Field(None, description="Up to and with /v1.")
    cluster: str | None = pydantic.Field(None, description="A running cluster's name; `auto`: the only one.")
    model: str | None = pydantic.Field(None, description="Default: the first that the endpoint lists.")
    api: Literal["completions", "chat"] = "completions"
    api_key_env: str | None = pydantic.Field(
        None, description="Environment variable that holds the key; default: OPENAI_API_KEY, where it is set."
    )
    headers: dict[str, str] = pydantic.Field({}, description="Shown in reports: keep secrets to api_key_env.")
    timeout_s: Seconds = pydantic.Field(600, description="Of one request, from the time it is sent.")

    @pydantic.model_validator(mode="after")
    def one_address(self) -> OpenAITarget:
        if (self.url is None) == (self.cluster is None):
            raise ValueError("give either url or cluster")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: {self.url!r} does not begin with http:// or https://")
        return self


class ExpertsTarget(Section):
    """The expert tier alone: gRPC Dispatch straight to the replicas that a directory lists."""

    kind: Literal["experts"]
    directory: str | None = pydantic.Field(None, description="host:port of the directory.")
    cluster: str | None = pydantic.Field(None, description="A running cluster's name; `auto`: the only one.")
    timeout_s: Seconds = pydantic.Field(30, description="Of one dispatch.")
    tls: TlsFiles | None = pydantic.Field(
        None, description="As the cluster's `security.tls`; default: that of `cluster`."
    )

    @pydantic.model_validator(mode="after")
    def one_address(self) -> ExpertsTarget:
        if (self.directory is None) == (self.cluster is None):
            raise ValueError("give either directory or cluster")
        return self


Target = Annotated[OpenAITarget | ExpertsTarget, pydantic.Field(discriminator="kind")]


class SharedPrefix(Section):
    """Some sessions begin with one of a few common texts, as with system prompts."""

    tokens: int = pydantic.Field(ge=1, description="Tokens of each prefix, on top of the prompt's own.")
    count: int = pydantic.Field(1, ge=1, description="Different prefixes.")
    share: Share = pydantic.Field(1, description="Of the sessions that have one.")


class Turns(Section):
    """Sessions of several requests, each with the whole conversation so far as its prompt."""

    number: Length
    think_s: float = pydantic.Field(1, ge=0, allow_inf_nan=False, description="Pause between an answer and the next.")


class DomainMix(Section):
    at_s: Instant = pydantic.Field(0, description="From this time of the run on.")
    weights: dict[str, Weight]

    @pydantic.model_validator(mode="after")
    def something_has_weight(self) -> DomainMix:
        if not sum(self.weights.values()) > 0:
            raise ValueError("weights: all are 0")
        return self


class Cancel(Section):
    share: Share = pydantic.Field(description="Of the requests, which hang up before the end.")
    after_tokens: Length = FixedLength(kind="fixed", value=8)


class Workload(Section):
    """What the requests of an OpenAI target hold."""

    prompt_tokens: Length = FixedLength(kind="fixed", value=128)
    output_tokens: Length = FixedLength(kind="fixed", value=64)
    prompts: Path | None = pydantic.Field(
        None, description='JSON {"domain": ["text", ...]}; default: made-up words, one domain.'
    )
    tokenizer: Path | None = pydantic.Field(
        None, description="tokenizer.json, for exact prompt lengths; without it 4 characters count as a token."
    )
    domains: tuple[DomainMix, ...] = pydantic.Field((), description="Default: all domains alike, all the time.")
    shared_prefix: SharedPrefix | None = None
    turns: Turns | None = None
    cancel: Cancel | None = None
    ignore_eos: bool = pydantic.Field(True, description="Answers run to their full length (vLLM's extension).")
    temperature: float = pydantic.Field(0, ge=0)
    body: dict[str, Any] = pydantic.Field({}, description="More keys for every request's JSON.")

    @pydantic.model_validator(mode="after")
    def times_ascend(self) -> Workload:
        times = [mix.at_s for mix in self.domains]
        if times != sorted(set(times)):
            raise ValueError("domains: at_s must ascend")
        if times and times[0] != 0:
            raise ValueError("domains: the first at_s must be 0")
        return self


class Shift(Section):
    """At a time of the run the popularity moves to other experts."""

    at_s: Instant
    by: int = pydantic.Field(ge=1, description="Every expert hands its popularity to the one this many places on.")


class CorrelatedPairs(Section):
    """Pairs of experts that are chosen together: where the first is among the k, so is the second."""

    pairs: tuple[tuple[int, int], ...] = pydantic.Field(min_length=1)
    probability: Share = 1


class Skew(Section):
    """Which experts the rows go to, by popularity rank; `permute_layers` gives each layer its own ranking."""

    kind: Literal["uniform", "zipf", "hot_set"] = "uniform"
    exponent: float = pydantic.Field(1, ge=0, le=10, description="Of zipf.")
    hot_experts: int = pydantic.Field(1, ge=1, description="Of hot_set: how many experts are hot.")
    hot_share: Share = pydantic.Field(0.9, description="Of hot_set: their share of the choices.")
    permute_layers: bool = False
    correlated: CorrelatedPairs | None = None
    shifts: tuple[Shift, ...] = ()


class ExpertLoad(Section):
    """What an experts target is sent."""

    rows: Length = FixedLength(kind="fixed", value=32)
    top_k: int | None = pydantic.Field(None, ge=1, description="Experts per row; default 2.")
    layers: str | None = pydantic.Field(None, description='MoE layers ("0-3"), in turn; default: all.')
    skew: Skew = Skew()


class Objectives(Section):
    """A request is good when it meets all that are given; goodput counts the good ones."""

    ttft_ms: Seconds | None = None
    tpot_ms: Seconds | None = None
    e2e_ms: Seconds | None = None
    share: float = pydantic.Field(0.99, gt=0, le=1, description="Of the requests, which must be good.")

    @property
    def given(self) -> dict[str, float]:
        """`ttft`, `tpot`, `e2e` -> limit, ms."""
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}
        return {name: limit for name, limit in limits.items() if limit is not None}


FaultKind = Literal[
    "kill",
    "hang",
    "slow",
    "partition",
    "corrupt",
    "restart_directory",
    "restart_router",
    "restart_controller",
    "restart_proxy",
]
Corruption = Literal["rows", "dtype", "nan", "checksum"]


class Fault(Section):
    """Done to a cluster that this machine's `expertmesh up` started."""

    at_s: Instant
    kind: FaultKind
    group: str | None = pydantic.Field(None, description="Whose replica; restarts have none.")
    replica: int = pydantic.Field(
        0, ge=0, description="Which, in the order of their ids; of restart_router, which router."
    )
    for_s: Seconds | None = pydantic.Field(
        None, description="Length of a hang, a slow spell or a partition; how long a corrupt replica is there."
    )
    factor: float = pydantic.Field(4, gt=1, le=100, description="Of slow: how many times slower.")
    what: Corruption = pydantic.Field(
        "rows",
        description="Of corrupt: its answers lack a row, are of another type, hold a NaN or belie their checksum.",
    )

    @pydantic.model_validator(mode="after")
    def fits_kind(self) -> Fault:
        if (self.group is None) != self.kind.startswith("restart_"):
            raise ValueError(f"{self.kind}: group: {'is missing' if self.group is None else 'has none'}")
        if (self.for_s is None) == (self.kind in {"hang", "slow", "partition", "corrupt"}):
            raise ValueError(f"{self.kind}: for_s: {'is missing' if self.for_s is None else 'has none'}")
        return self


class Sampling(Section):
    every_s: Seconds = 1
    metrics: tuple[str, ...] = pydantic.Field((), description="URLs of Prometheus pages to scrape beside the target's.")


class Client(Section):
    processes: int = pydantic.Field(1, ge=1, le=256)
    max_lateness_ms: Seconds = pydantic.Field(20, description="Of the 99th percentile; beyond it a run is invalid.")
    warmup_requests: int = pydantic.Field(1, ge=0, description="Sent and awaited before the clock starts.")
    drain_s: Seconds = pydantic.Field(120, description="How long open requests may go on after the last stage.")
    start_after_s: Seconds = pydantic.Field(0.5, description="Head start of the client processes.")


class RunConfig(Section):
    name: StageName = "loadtest"
    target: Target
    stages: tuple[Stage, ...] = pydantic.Field(min_length=1)
    workload: Workload | None = pydantic.Field(None, description="Of an openai target.")
    expert_load: ExpertLoad | None = pydantic.Field(None, description="Of an experts target.")
    objectives: Objectives = Objectives()
    faults: tuple[Fault, ...] = ()
    sampling: Sampling = Sampling()
    client: Client = Client()
    seed: int = pydantic.Field(0, ge=0, description="Same seed, same requests; each repeat draws anew from it.")
    repeats: int = pydantic.Field(1, ge=1, le=100)
    pause_s: float = pydantic.Field(2, ge=0, description="Between repeats.")

    @pydantic.model_validator(mode="after")
    def parts_fit(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stages: {min(twice)!r} stands twice")
        if not any(stage.measured for stage in self.stages):
            raise ValueError("stages: none is measured")
        wrong = "expert_load" if self.target.kind == "openai" else "workload"
        if getattr(self, wrong) is not None:
            raise ValueError(f"{wrong}: does not go with a target of kind {self.target.kind}")
        if self.target.kind == "experts" and any(stage.arrivals.kind == "trace" for stage in self.stages):
            raise ValueError("stages: a trace does not go with a target of kind experts")
        if self.faults and self.target.cluster is None:
            raise ValueError("faults: only a cluster of one's own can be hurt: give target.cluster")
        return self

    @property
    def text(self) -> Workload:
        """The workload of an openai target."""
        return self.workload or Workload()

    @property
    def rows(self) -> ExpertLoad:
        """The load of an experts target."""
        return self.expert_load or ExpertLoad()


def load_run(path: Path) -> RunConfig:
    """Reads a run's file; relative paths start at its folder. Raises ConfigError with one line: file, key, what."""
    config = read_model(path, RunConfig, "a run begins with `target:` and `stages:`", hidden=KINDS)
    return resolve_paths(config, path.parent)


KINDS = frozenset(
    {"fixed", "uniform", "lognormal", "file", "poisson", "gamma", "constant", "trace", "closed", "openai", "experts"}
)
"""Tags of the unions, which pydantic puts into an error's location."""


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """All paths in it, absolute."""
    fields = {name: _resolved(getattr(config, name), folder) for name in RunConfig.model_fields}
    return config.model_copy(update=fields)


def _resolved(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return (folder / value).resolve()
    if isinstance(value, tuple):
        return tuple(_resolved(item, folder) for item in value)
    if isinstance(value, pydantic.BaseModel):
        fields = {name: _resolved(getattr(value, name), folder) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    return value
