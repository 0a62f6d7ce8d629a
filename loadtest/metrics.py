"""What the records say, by the definitions of `vllm bench serve`; pure.

TTFT: from when a request was due to its first event with choices. ITL: gaps between such events, of all requests in
one pool. E2E: from when it was due to its last such event. TPOT: (E2E - TTFT) / (output tokens - 1), of answers of two
tokens and more. vLLM counts from when a request is sent; here it is from when it was due, and the client's lateness is
told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.config import Objectives
from loadtest.records import INTENDED, RequestRecord, StageSpan, Status

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
FIGURES = ("ttft", "tpot", "itl", "e2e")
Floats = npt.NDArray[np.float64]


def ttft_s(record: RequestRecord) -> float:
    return record.token_times[0] - record.scheduled_s


def e2e_s(record: RequestRecord) -> float:
    return record.token_times[-1] - record.scheduled_s


def tpot_s(record: RequestRecord) -> float | None:
    """None for an answer of one token."""
    if record.output_tokens < 2:
        return None
    return (record.token_times[-1] - record.token_times[0]) / (record.output_tokens - 1)


def itl_s(record: RequestRecord) -> Floats:
    """[events - 1] gaps."""
    return np.diff(np.asarray(record.token_times))


def is_good(record: RequestRecord, objectives: Objectives) -> bool:
    """Answered in full, and within every limit that is given; an answer of one token has a TPOT of 0."""
    if record.status != "ok":
        return False
    limits = objectives.given
    found = {"ttft": ttft_s(record), "tpot": tpot_s(record) or 0.0, "e2e": e2e_s(record)}
    return all(1000 * found[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True)
class Distribution:
    """Of one figure, seconds."""

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[float, float]


def distribution(values: Floats) -> Distribution | None:
    """None where there is no value; percentiles are interpolated linearly, as numpy and vLLM do."""
    if not len(values):
        return None
    found = np.percentile(values, PERCENTILES)
    percentiles = {percent: float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
    return Distribution(
        len(values), float(values.mean()), float(values.std()), float(values.min()), float(values.max()), percentiles
    )


def values_of(records: Iterable[RequestRecord]) -> dict[str, Floats]:
    """`ttft`, `tpot`, `itl`, `e2e`, seconds, of the requests that were answered in full; `lateness` of all sent."""
    records = list(records)
    answered = [record for record in records if record.status == "ok"]
    tpots = [tpot for record in answered if (tpot := tpot_s(record)) is not None]
    gaps = [itl_s(record) for record in answered]
    return {
        "ttft": np.array([ttft_s(record) for record in answered]),
        "tpot": np.array(tpots),
        "itl": np.concatenate(gaps) if gaps else np.array([]),
        "e2e": np.array([e2e_s(record) for record in answered]),
        "lateness": np.array([late for record in records if (late := record.lateness_s) is not None]),
    }


@dataclass(frozen=True)
class Figures:
    """Of one set of requests over `seconds`."""

    seconds: float
    requests: int
    statuses: dict[Status, int]
    good: int
    """Requests that meet the objectives; all that were answered, where none is given."""
    due: int
    """Requests that ought to have been good: all but those cancelled on purpose or cut off by the run's end."""
    prompt_tokens: int
    output_tokens: int
    """Of the answers that are complete."""
    distributions: dict[str, Distribution | None]

    @property
    def answered(self) -> int:
        return self.statuses.get("ok", 0)

    @property
    def errors(self) -> int:
        """Neither answered, nor cancelled on purpose, nor cut off by the run's end."""
        unharmed = sum(self.statuses.get(status, 0) for status in (*INTENDED, "unfinished"))
        return self.requests - unharmed

    @property
    def request_rate(self) -> float:
        return self.answered / self.seconds

    @property
    def goodput(self) -> float:
        """Good requests per second."""
        return self.good / self.seconds

    @property
    def good_share(self) -> float:
        """Of the requests that were due; 1 where none was."""
        return self.good / self.due if self.due else 1.0

    @property
    def output_rate(self) -> float:
        """Tokens per second."""
        return self.output_tokens / self.seconds


def figures(records: Sequence[RequestRecord], seconds: float, objectives: Objectives) -> Figures:
    statuses = Counter(record.status for record in records)
    answered = [record for record in records if record.status == "ok"]
    values = values_of(records)
    return Figures(
        seconds=seconds,
        requests=len(records),
        statuses=dict(statuses),
        good=sum(is_good(record, objectives) for record in records),
        due=len(records) - statuses["cancelled"] - statuses["unfinished"],
        prompt_tokens=sum(record.prompt_tokens for record in answered),
        output_tokens=sum(record.output_tokens for record in answered),
        distributions={name: distribution(found) for name, found in values.items()},
    )


def measured(records: Iterable[RequestRecord], stages: Iterable[StageSpan]) -> list[RequestRecord]:
    """The requests of the stages that count."""
    counting = {stage.name for stage in stages if stage.measured}
    return [record for record in records if record.stage in counting]


def measured_seconds(records: Sequence[RequestRecord], stages: Iterable[StageSpan]) -> float:
    """What rates of one repeat are taken over: the measured stages, and on until the last of their answers ended."""
    spans = [stage for stage in stages if stage.measured]
    last = max((record.done_s for record in records), default=0.0)
    tail = max(0.0, last - max(span.end_s for span in spans))
    return sum(span.end_s - span.start_s for span in spans) + tail


def lateness_p99_s(records: Iterable[RequestRecord]) -> float:
    """0 where nothing was sent."""
    late = [late for record in records if (late := record.lateness_s) is not None]
    return float(np.percentile(late, 99)) if late else 0.0


def is_late(records: Iterable[RequestRecord], max_lateness_ms: float) -> bool:
    """Whether the client missed its schedule, which makes a run invalid."""
    return 1000 * lateness_p99_s(records) > max_lateness_ms
