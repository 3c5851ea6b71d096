"""The measured part of a model card: decision, table, protocol, environment, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyllava_edge.benchmarks.decision import COSTS
from tinyllava_edge.benchmarks.report_machine import bounds, engines
from tinyllava_edge.benchmarks.report_tables import cell, legend, markdown_table
from tinyllava_edge.benchmarks.summary_types import Decision, Summary


def model_card_section(summary: Summary, *, level: int = 2) -> str:
    """Decision, table, protocol and environment of a summary; empty where nothing was measured.

    Args:
        summary: what `summarise` computed.
        level: of the section's heading.

    Raises DependencyError without scipy, where two builds were timed.
    """
    if not summary.rows:
        return ""
    mark = "#" * level
    parts = [f"{mark} Measured", *(_decision(summary, decision) for decision in summary.decisions)]
    parts += [markdown_table(summary).rstrip(), _protocol(summary)]
    machines = [_machine(machine, len(summary.targets) > 1) for machine in summary.machines]
    if machines:
        parts += [f"{mark}# Environment", "\n".join(machines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _decision(summary: Summary, decision: Decision) -> str:
    if not decision.target:
        return ""
    place = f" on {cell(decision.target)}" if len(summary.targets) > 1 else ""
    limits = ", ".join(f"{COSTS[name][0]} ≤ {COSTS[name][2](limit)}" for name, limit in decision.budget.items())
    asked = f" for a budget of {limits}" if limits else ""
    head = f"Ship **{cell(decision.build)}**" if decision.build else "Ship **none of these builds**"
    against = [f"- {cell(build)}: {cell(why)}" for build, why in decision.rejected.items()]
    text = f"{head}{place}{asked}. {' '.join(map(cell, decision.reasons))}"
    return "\n".join([text, *(["", "Not shipped:", "", *against] if against else [])])


def _protocol(summary: Summary) -> str:
    row = next((row for row in summary.rows if row.accuracy), None)
    words = []
    if row is not None:
        how = f"under protocol `{_code(summary.protocol)}`" if summary.protocol else "exact match after strip and lower"
        words.append(f"Accuracy: {row.n:,} questions, {how}, greedy decoding, 95 % Wilson intervals in the report.")
    if any(row.ttft for row in summary.rows):
        words += legend(summary)
    if any(row.memory for row in summary.rows):
        words.append("Peak memory: one process per build.")
    if notes := {note for row in summary.builds if row.energy is None for note in row.energy_notes}:
        words.append(f"Energy was not measured: {cell('; '.join(sorted(notes)))}.")
    return " ".join(words)


def _machine(machine: Mapping[str, Any], several: bool) -> str:
    cpu = machine.get("cpu")
    cpu = cpu if isinstance(cpu, dict) else {}
    memory, libraries = machine.get("memory_bytes"), machine.get("libraries")
    affinity = cpu.get("affinity")
    cores = len(affinity) if isinstance(affinity, list) and affinity else cpu.get("cores")
    parts = [str(cpu.get("model") or "unnamed processor")]
    parts += [f"{cores} cores"] if cores else []
    parts += [f"{memory / 1e9:.0f} GB"] if isinstance(memory, int | float) else []
    parts += [str(machine["system"])] if machine.get("system") else []
    parts += [f"Python {machine['python']}"] if machine.get("python") else []
    parts += [f"{name} {version}" for name, version in libraries.items()] if isinstance(libraries, dict) else []
    limited = bounds(machine.get("limits"))
    parts += [f"container limits: {limited}"] if limited != "none" else []
    runtime = machine.get("runtime")
    told = engines(runtime) if isinstance(runtime, dict) else []
    parts += [f"{engine} {fact} {value}" for (engine, fact), value in told if fact]
    place = f"{cell(str(machine.get('target', '')))}: " if several else ""
    return f"- {place}{cell(', '.join(parts))}"


def _code(text: str) -> str:
    """Text between backticks."""
    return " ".join(text.replace("`", "'").split())
