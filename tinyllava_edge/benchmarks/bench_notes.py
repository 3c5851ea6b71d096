"""What stands below the table of `bench`: what the run can tell, the machine's load, shares of the roofline."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllava_edge.benchmarks import roofline as roof
from tinyllava_edge.benchmarks.results import Sample

COARSE = 0.10  # resolution above which a run is said to tell little
LOADED = 0.5  # of the cores: load average before the run from which other programs are worth a line


def resolution(samples: Sequence[Sample]) -> str:
    """A paragraph for each run: the change that it would have found, and whether that is what was asked for."""
    lines = []
    for sample in samples:
        if sample.kind != "condition" or sample.stage != "after" or "resolution" not in sample.detail:
            continue
        found, asked = sample.detail["resolution"], sample.detail.get("resolution_asked") or 0.0
        where = "" if sample.target == "cpu" else f" on {sample.target}"
        told = f"{sample.detail.get('rounds')} rounds{where}, ended by {sample.detail.get('stopped_by')}: "
        if found is None:
            lines.append(f"{told}too few to compare anything; give -r 8 or more.")
            continue
        told += f"a change of {100 * found:.1f} % would be found by four of five such runs."
        if found > COARSE:
            told += " That is over 10 %: smaller differences stay unseen. Quieten the machine, or raise -r."
        elif asked and found > asked:
            told += f" {100 * asked:.3g} % were asked for."
        lines.append(told)
    return "".join(f"\n{line}\n" for line in lines)


def load(samples: Sequence[Sample]) -> str:
    """A paragraph for each target that other programs kept busy before the run."""
    cores = {s.target: (s.detail.get("cpu") or {}) for s in samples if s.kind == "environment"}
    lines = []
    for sample in samples:
        average = sample.detail.get("load_average") if sample.kind == "condition" and sample.stage == "before" else None
        if not average:
            continue
        cpu = next((cpu for target, cpu in cores.items() if target == sample.target), next(iter(cores.values()), {}))
        count = len(cpu.get("affinity") or []) or cpu.get("cores") or 1
        if average[0] > LOADED * count:
            where = "" if sample.target == "cpu" else f" on {sample.target}"
            lines.append(
                f"Before the run{where} the load average was {average[0]:.1f} on {count} cores: other programs were "
                "running. Builds of this run can be compared, but not with another run."
            )
    return "".join(f"\n{line}\n" for line in lines)


def roofline(samples: Sequence[Sample]) -> str:
    """Each stage as a share of what this machine can do at best; a dash and the reason where there is none."""
    found = roof.shares(samples)
    if not found:
        return ""
    lines = ["", "| test | build | target | share of the roofline | work | ceiling | |"]
    lines.append("|---|---|---|---:|---:|---:|---|")
    without: dict[tuple[str, str, str], list[str]] = {}
    for share in found:
        if share.share_percent is None:
            without.setdefault((share.stage, share.target, share.note), []).append(share.build)
    for share in sorted(found, key=lambda share: share.stage):
        build, cells = share.build, ["–", "", ""]
        if share.share_percent is not None and share.work is not None and share.ceiling is not None:
            work, ceiling = f"{share.work:.4g} {share.unit}", f"{share.ceiling:.4g} {share.unit}/s"
            cells = [f"{share.share_percent:.1f} %", work, ceiling]
        else:  # one line for all builds that have none for the same reason
            builds = without.pop((share.stage, share.target, share.note), None)
            if builds is None:
                continue
            build = ", ".join(builds)
        lines.append("| " + " | ".join([share.stage, build, share.target, *cells, share.note]) + " |")
    return "\n".join(lines) + "\n"
