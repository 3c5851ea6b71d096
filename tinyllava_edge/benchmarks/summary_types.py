"""What `summary` computes and everything else shows: a row per build and target, a decision per target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.stats import Flips, Interval

ALLOWED_LOSS = 1.0  # points of accuracy that a build may lose against the reference and still ship
NOISY = 0.10  # coefficient of variation above which a figure is flagged
STAGES = ("decode_image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "first_token_ms")  # they add up to the TTFT
WHOLE = ("ttft_ms", "total_ms")  # times of a whole answer, which verdicts on a build rest on
REFERENCE = "reference"  # the runtime of the checkpoint
EDGE = "edge"  # the runtime of a bundle's builds
BROWSER = "web"  # the runtime of a browser's builds, whose names say so


@dataclass(frozen=True)
class BuildSummary:
    """What was measured of one build, or of the reference, on one target; None where nothing was."""

    runtime: str
    """`edge` or `reference`"""
    build: str
    """build name, or the checkpoint's precision"""
    bytes: int | None
    """size on disk"""
    sizes: Mapping[str, int]
    """bytes by role"""
    accuracy: Interval | None
    """share of exact matches, 0..1"""
    n: int
    """questions answered"""
    by_type: Mapping[str, Interval]
    """accuracy by question type"""
    by_tier: Mapping[str, Interval]
    """accuracy by tier"""
    ttft: Interval | None
    """median time to first token in ms with its bootstrap interval"""
    ttft_p90: float | None
    """90th percentile in ms"""
    ttft_mad: float | None
    """median absolute deviation in ms"""
    samples: int
    """answers that were timed"""
    stages: Mapping[str, float]
    """median of every latency stage"""
    memory: Mapping[str, int]
    """largest sample of every memory stage, in bytes"""
    verified: bool | None
    """the verify record's verdict"""
    verify: Mapping[str, Any]
    """the verify record"""
    flips: Flips | None
    """against the reference, over the questions that the accuracy counts"""
    tier_flips: Flips | None
    """against the reference, over the questions with a tier, where those are counted apart"""
    target: str = "cpu"
    """where it ran"""
    place: str = ""
    """the target where rows of several targets stand together, else empty"""
    answered_on: str = ""
    """target whose answers the accuracy counts, where this one gave none; else empty"""
    total: Interval | None = None
    """median time from request to last token in ms with its bootstrap interval"""
    energy: Interval | None = None
    """median energy of one answer in J with its bootstrap interval"""
    energy_notes: tuple[str, ...] = ()
    """what the energy was read from, or why it could not be read"""
    variation: Mapping[str, float] = field(default_factory=dict)
    """coefficient of variation (standard deviation / mean) of every latency stage with three samples or more"""
    runs: int = 1
    """measurements whose samples are pooled here"""
    left_out: int = 0
    """measurements on another machine, with other versions, threads, pictures or questions: not in this row"""
    lines: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict, repr=False)
    """raw lines of each time of WHOLE, to compare builds round by round"""

    @property
    def name(self) -> str:
        """What the build is called among the rows of one target."""
        return self.build if self.runtime in (EDGE, BROWSER) else f"{self.runtime} {self.build}"

    @property
    def label(self) -> str:
        """What the build is called in tables."""
        return f"{self.name} on {self.place}" if self.place else self.name

    @property
    def key(self) -> tuple[str, str, str]:
        """Target, runtime and build: what tells rows apart."""
        return self.target, self.runtime, self.build

    @property
    def noisy(self) -> bool:
        """Whether the samples of the time to the first token scatter by more than a tenth."""
        return self.scatters("ttft_ms")

    def scatters(self, stage: str) -> bool:
        """Whether the samples of a stage scatter by more than a tenth."""
        return self.variation.get(stage, 0.0) > NOISY


@dataclass(frozen=True)
class Decision:
    """Which build to ship on one target."""

    build: str | None
    """its name, or None when no build qualifies"""
    reasons: tuple[str, ...]
    """sentences that say why"""
    rejected: Mapping[str, str]
    """build → what speaks against it"""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """build that qualifies too → why another one is shipped"""
    target: str = ""
    """the target; empty where no builds are"""
    budget: Mapping[str, float] = field(default_factory=dict)
    """limits that were asked for: ttft_ms, total_ms, peak_rss and size (bytes), energy (J), drop (points)"""
    runtime: str = EDGE
    """runtime of the build"""

    def ships(self, row: BuildSummary) -> bool:
        """Whether a row is the build to ship."""
        return self.build is not None and row.key == (self.target, self.runtime, self.build)


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows, computed from raw samples."""

    builds: tuple[BuildSummary, ...]
    """builds by target, each in order of first appearance"""
    reference: BuildSummary | None
    """the checkpoint that the builds came from, on the first target that ran it"""
    blind: tuple[AnswerRecord, ...]
    """answers with shuffled pictures: the reference's, or else the first build's"""
    decision: Decision
    """which build to ship on the first target"""
    decisions: tuple[Decision, ...] = ()
    """one per target that was measured, the first one included"""
    references: tuple[BuildSummary, ...] = ()
    """the checkpoint on every target that ran it"""
    machines: tuple[Mapping[str, Any], ...] = ()
    """`environment` lines' details, one per machine"""
    protocol: str = ""
    """id of everything that moves the accuracy; empty for exact match on a LLaVA JSON file"""
    allowed_loss: float = ALLOWED_LOSS
    """points of accuracy that a build may lose"""

    @property
    def targets(self) -> tuple[str, ...]:
        """Where builds ran, in order of first appearance."""
        return tuple(dict.fromkeys(row.target for row in self.builds))

    @property
    def rows(self) -> tuple[BuildSummary, ...]:
        """References, then builds."""
        return (*self.references, *self.builds)

    def ships(self, row: BuildSummary) -> bool:
        """Whether a row is the build to ship on its target."""
        return any(decision.ships(row) for decision in self.decisions)

    def chosen(self, target: str) -> BuildSummary | None:
        """The row to ship on a target."""
        return next((row for row in self.builds if row.target == target and self.ships(row)), None)


def by_target(items: Sequence[Any], several: bool) -> list[dict[str, Any]]:
    """Rows, or tables of what belongs to a `row`, in groups; a target is named only where there are several."""
    table: dict[str, list[Any]] = {}
    for item in items:
        row = item["row"] if isinstance(item, dict) else item
        table.setdefault(row.target, []).append(item)
    return [{"target": target if several else "", "rows": rows} for target, rows in table.items()]


def on_target(rows: Sequence[BuildSummary], target: str) -> list[BuildSummary]:
    """The rows of one target."""
    return [row for row in rows if row.target == target]
