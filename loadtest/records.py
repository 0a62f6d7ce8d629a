"""What a run leaves behind: one record per request, samples of the servers, and what befell the client itself.

All times are seconds since the run began (of the repeat that `repeat` names), on one clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal[
    "ok",
    "cancelled",
    "rejected",
    "server_error",
    "refused",
    "disconnected",
    "timeout",
    "bad_answer",
    "unfinished",
]
"""ok · cancelled: by the workload's own wish · rejected: HTTP 4xx or INVALID_ARGUMENT · server_error: HTTP 5xx,
or an error event in the stream · refused: no connection · disconnected: it broke before the end · timeout: no end in
time · bad_answer: something else than the protocol · unfinished: the run ended (Ctrl-C, an aborted trial) before it."""
STATUSES: tuple[Status, ...] = get_args(Status)
INTENDED: frozenset[Status] = frozenset({"ok", "cancelled"})
"""What is no error. `unfinished` is neither an error nor an answer."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, sent or not: nothing that was scheduled is missing from a run's records."""

    repeat: int
    stage: str
    index: int
    """Of the session in the repeat's schedule."""
    turn: int
    """Of the session, from 0."""
    domain: str
    scheduled_s: float
    """When it was due; every latency counts from here."""
    sent_s: float | None
    """When the client began to send it; None where the run ended before."""
    token_times: tuple[float, ...]
    """Arrival of each streamed event that bears choices, as vLLM counts; the expert tier's answer is one."""
    done_s: float
    """End of the answer or of the attempt."""
    prompt_tokens: int
    """As the server counted; as intended where it did not say. Rows sent, for the expert tier."""
    output_tokens: int
    """As the server counted; else the number of events. Rows answered, for the expert tier."""
    status: Status
    error: str = ""
    process: int = 0
    """The client process that sent it."""

    @property
    def first_token_s(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def lateness_s(self) -> float | None:
        return None if self.sent_s is None else self.sent_s - self.scheduled_s


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one series: `name` is the figure, `label` whose it is (a group, a replica, `engine`, `client`)."""

    repeat: int
    at_s: float
    name: str
    label: str
    value: float


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault as it was done."""

    repeat: int
    at_s: float
    kind: str
    target: str
    """The replica or process that it hit."""
    until_s: float | None = None
    """End of what lasts."""
    error: str = ""
    """Why it could not be done."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """When a stage began and ended, and whether its requests count."""

    name: str
    start_s: float
    end_s: float
    measured: bool


@dataclass(frozen=True, slots=True)
class ExpertRows:
    layer: int
    expert: int
    rows: int


@dataclass(frozen=True)
class Run:
    """All that one run, with its repeats, has brought to light."""

    stages: tuple[StageSpan, ...]
    """Of each repeat alike."""
    records: tuple[RequestRecord, ...]
    samples: tuple[Sample, ...]
    faults: tuple[FaultRecord, ...]
    repeats: int
    """How many were begun."""
    interrupted: bool
    """Ctrl-C: the records are those until then."""
    started_at: float
    """Unix time."""
    durations_s: tuple[float, ...]
    """Of each repeat, until its last answer."""
    client_processes: int
    notes: tuple[str, ...] = ()
    """Remarks for the report, for instance how many lines of a trace were failures and were left out."""
    skew: tuple[ExpertRows, ...] = ()
    """Rows that each expert computed during the run, where a directory tells."""
