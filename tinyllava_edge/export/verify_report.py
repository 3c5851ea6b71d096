"""What `verify` found, as plain values: per build, and for the bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.bundle import WEB

from .compare import Check


@dataclass(frozen=True)
class BuildReport:
    """Verdict on one build."""

    build: str
    """build name"""
    passed: bool
    """every gated check passed"""
    first_divergence: str | None
    """first stage that did not pass"""
    checks: tuple[Check, ...]
    """in the order of the road"""
    samples: int
    """pictures compared"""
    tie_margin: float
    """logit distance up to which two tokens count as tied: twice the build's largest logit error; 0 when quantised"""

    def record(self, checkpoint: str) -> dict[str, Any]:
        """What the stamp and the results keep."""
        return {**asdict(self), "checkpoint": checkpoint, "version": __version__}


@dataclass(frozen=True)
class VerifyReport:
    """Verdict on a bundle."""

    bundle: str
    """model name"""
    bundle_sha256: str
    """digest of bundle.json"""
    checkpoint: str
    """the checkpoint's directory name"""
    version: str
    """version that verified"""
    builds: tuple[BuildReport, ...]
    """one per build"""
    peak_rss: int = 0
    """largest resident set of this process so far, in bytes; the reference in float32 has the most part in it"""

    @property
    def passed(self) -> bool:
        """Whether every build passed."""
        return all(build.passed for build in self.builds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """The parity table for a terminal: one line per stage and build."""
        table = []
        for build in self.builds:
            verdict = "passed" if build.passed else f"DIVERGES at {build.first_divergence}"
            table.append(f"{build.build}: {verdict}, {build.samples} pictures")
            table += [f"  {check.line()}" for check in build.checks]
        return [*table, f"peak memory of verify: {self.peak_rss / 2**30:.2f} GiB"] if self.peak_rss else table

    def samples(self, environment_id: str = "") -> list[Sample]:
        """One `verify` line per build for results.jsonl.

        The target is this CPU for a browser's builds too: their graphs ran here, in no browser. Reports join by build.
        """
        lines = []
        for found in self.builds:
            runtime = "web" if found.build.startswith(WEB) else "edge"
            detail = found.record(self.checkpoint)
            lines.append(Sample("verify", runtime, found.build, environment_id=environment_id, detail=detail))
        return lines
