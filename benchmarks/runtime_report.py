"""Tables of runtime_speed.py's samples; every ratio is computed from the samples that stand beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Samples = list[dict[str, Any]]
STAGES = {
    "picture → RGB": "decode_image_ms",
    "preprocess + vision": "see_ms",
    "prefill": "prefill_ms",
    "first token (TTFT)": "ttft_ms",
}


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at, and what was measured."""

    what: str
    """what is compared"""
    model: str
    """bundle"""
    value: float
    """median ratio of a repetition, or a median"""
    low: float
    """lowest of the repetitions"""
    high: float
    """highest of them"""
    aim: float
    """the target"""
    at_most: bool
    """whether less is better"""
    n: int = 1
    """pairs or repetitions that it rests on"""

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.aim if self.at_most else self.value >= self.aim


def pick(samples: Samples, part: str, model: str, who: str = "") -> Samples:
    """Samples of a part and model, of one participant if it is named."""
    return [s for s in samples if s["part"] == part and s["model"] == model and who in ("", s["who"])]


def values(samples: Samples, key: str) -> list[float]:
    """The numbers under a key."""
    return [s[key] for s in samples if s.get(key) is not None]


def ratio(what: str, aim: float, at_most: bool, ours: Samples, theirs: Samples, key: str) -> Target | None:
    """Median, lowest and highest ratio of pairs of the same repetition. None without a pair."""
    by = {s["repetition"]: s[key] for s in theirs if s.get(key) is not None}
    pairs = [s[key] / by[s["repetition"]] for s in ours if s["repetition"] in by and s.get(key) is not None]
    if not pairs:
        return None
    return Target(what, ours[0]["model"], statistics.median(pairs), min(pairs), max(pairs), aim, at_most, len(pairs))


def best(groups: Sequence[Samples], key: str, choose: Callable[..., Any]) -> Samples:
    """The participant with the best median."""
    filled = [group for group in groups if values(group, key)]
    return choose(filled, key=lambda group: statistics.median(values(group, key))) if filled else []


def targets(samples: Samples) -> list[Target]:
    """Every target that these samples say something about."""
    found: list[Target | None] = []
    for model in models(samples):
        ours, mtmd = pick(samples, "ttft", model, "ours"), pick(samples, "ttft", model, "mtmd")
        bare = pick(samples, "ttft", model, "ours, no caches")
        kinds = sorted({s["who"] for s in pick(samples, "transformers", model)})
        hf = best([pick(samples, "transformers", model, kind) for kind in kinds], "ttft_ms", min)
        loops = sorted({s["who"] for s in pick(samples, "decode", model)} - {"ours"})
        loop = best([pick(samples, "decode", model, name) for name in loops], "tokens_per_s", max)
        steps, second = pick(samples, "decode", model, "ours"), pick(samples, "second", model)
        found += [
            ratio("vision, ours / mtmd", 0.35, True, ours, mtmd, "see_ms"),
            ratio("TTFT, ours / mtmd", 0.75, True, ours, mtmd, "ttft_ms"),
            ratio("TTFT, ours without any cache / mtmd", 0.75, True, bare, mtmd, "ttft_ms"),
            ratio(f"TTFT, ours / transformers ({hf[0]['who'] if hf else ''})", 0.3, True, ours, hf, "ttft_ms"),
            ratio("second question / first, TTFT", 0.1, True, second, ours, "ttft_ms"),
            ratio("decode, ours / best llama_decode loop", 0.98, False, steps, loop, "tokens_per_s"),
        ]
        for who in sorted({s["who"] for s in pick(samples, "nano", model)}):
            rows = pick(samples, "nano", model, who)
            for what, key, aim in (("TTFT", "ttft_ms", 25.0), ("outside the engines", "overhead_ms", 3.0)):
                numbers = values(rows, key)
                spread = (statistics.median(numbers), min(numbers), max(numbers))
                found.append(Target(f"{what}, {who}, ms", model, *spread, aim, True, len(numbers)))
    return [target for target in found if target is not None]


def models(samples: Samples) -> list[str]:
    """Bundles in the order of measuring."""
    return list(dict.fromkeys(s["model"] for s in samples if s["model"]))


def report(samples: Samples) -> str:
    """The whole Markdown document."""
    text = ["# Speed of the on-device runtime", "", *_head(samples), "", "## Targets", ""]
    text += _table(
        ["what", "model", "measured (min..max)", "n", "target", ""],
        [
            [t.what, t.model, f"{t.value:.3g}" + (f" ({t.low:.3g}..{t.high:.3g})" if t.n > 1 else ""), str(t.n),
             f"{'≤' if t.at_most else '≥'} {t.aim:g}", "met" if t.met else "not met"]
            for t in targets(samples)
        ],
    )  # fmt: skip
    text += ["", "A ratio is that of one repetition, in which both took their turn: median, lowest and highest of n."]
    for model in models(samples):
        text += ["", f"## {model}"]
        for part in (_ttft, _decode, _ceilings, _transformers, _cold, _nano):
            lines = part(samples, model)
            text += ["", *lines] if lines else []
    size = [s for s in samples if s["part"] == "size"]
    if size:
        total = sum(size[0]["bytes"].values())
        text += ["", "## Installed size, device runtime only", ""]
        rows = sorted(size[0]["bytes"].items(), key=lambda row: -row[1])
        text += _table(["package", "MB"], [[k, f"{v / 1e6:.1f}"] for k, v in [("all", total), *rows]])
    failed = [s for s in samples if s["part"] == "failed"]
    if failed:
        text += ["", "## Failed", "", *(f"- {s['model']} {s['who']}: {s['error']}" for s in failed)]
    return "\n".join([*text, ""])


def _head(samples: Samples) -> list[str]:
    found = next((s for s in samples if s["part"] == "environment"), None)
    if found is None:
        return []
    loads = [s["load"] for s in samples if s.get("load") is not None]
    versions = ", ".join(f"{k} {v}" for k, v in found["packages"].items())
    spent = {f"{s['model']} {s['who']}".strip(): s["seconds"] for s in samples if s["part"] == "seconds"}
    return [
        f"`{found['command']}`",
        "",
        f"- {found['machine']}; {found['system']}; {found['threads']} threads for each participant; {found['time']}",
        f"- Python {found['python']}, {versions}",
        f"- llama.cpp: `{found['llama_cpp_system_info']}`, weights repacked: {found['llama_cpp_repack']}",
        f"- load average before {loads[0]}, after {loads[-1]}, highest between {max(loads)} (our own threads count)"
        if loads
        else "- load average unknown",
        f"- seconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in spent.items())}",
    ]


def _ttft(samples: Samples, model: str) -> list[str]:
    rows = pick(samples, "ttft", model) + pick(samples, "second", model)
    if not rows:
        return []
    names = list(dict.fromkeys(s["who"] for s in sorted(rows, key=lambda s: s["who"])))
    groups = {name: pick(samples, "ttft", model, name) for name in names}
    groups = {**groups, "ours, second question": pick(samples, "second", model)}
    groups = {name: group for name, group in groups.items() if group}
    table = [[stage, *(_spread(group, key) for group in groups.values())] for stage, key in STAGES.items()]
    table.append(["decode, tokens/s", *(_spread(group, "tokens_per_s") for group in groups.values())])
    table.append(["positions", *(f"{group[0]['n_prompt_tokens']}" for group in groups.values())])
    table.append(["image embeddings", *(f"{group[0]['n_image_tokens']}" for group in groups.values())])
    table.append(["positions from the cache", *(_spread(group, "n_cached_tokens") for group in groups.values())])
    said = (
        f"A question about a new picture, build {rows[0]['build']}; ms, median (min..max) of {len(groups[names[0]])}."
    )
    peer = "mtmd: mmproj f16, the same GGUF, fused attention in both halves, batches of 512; it preprocesses inside."
    return [said, peer, "", *_table(["", *groups], table)]


def _decode(samples: Samples, model: str) -> list[str]:
    rows = pick(samples, "decode", model)
    if not rows:
        return []
    names = sorted({s["who"] for s in rows}, key=lambda name: (name != "ours", name))
    limit = next(iter(pick(samples, "ceilings", model)), None)
    table = []
    for name in names:
        group = pick(samples, "decode", model, name)
        share = ""
        if limit and values(group, "tokens_per_s"):
            rate = statistics.median(values(group, "tokens_per_s"))
            share = f"{rate * limit['bytes_per_token'] / limit['read_bytes_per_s']:.0%}"
        table.append([name, _spread(group, "tokens_per_s"), _spread(group, "tokens_per_s_by_clock"), share])
    said = f"Decode after {rows[0]['depth']} positions, build {rows[0]['build']}, tokens/s."
    return [said, "", *_table(["", "decode steps", "by the caller's clock", "of memory bandwidth"], table)]


def _ceilings(samples: Samples, model: str) -> list[str]:
    limit = next(iter(pick(samples, "ceilings", model)), None)
    if limit is None:
        return []
    lines = [
        f"Ceilings: memory reads {limit['read_bytes_per_s'] / 1e9:.1f} GB/s; ONNX Runtime's products "
        f"{limit['fp32_ops_per_s'] / 1e9:.0f} GFLOP/s in fp32, {limit['int8_ops_per_s'] / 1e9:.0f} in int8. "
        f"A decode step reads {limit['bytes_per_token'] / 1e6:.0f} MB of weights; "
        f"vision is {limit['vision_ops'] / 1e9:.0f} GFLOP.",
        "",
    ]
    table = []
    for name in ("ours", "ours, no caches", "mtmd"):
        group = pick(samples, "ttft", model, name)
        if group:
            see = limit["vision_ops"] / (statistics.median(values(group, "see_ms")) / 1000)
            work = [
                2 * (limit["body"] * (s["n_prompt_tokens"] - s["n_cached_tokens"]) + limit["head"]) / s["prefill_ms"]
                for s in group
            ]
            shares = [f"{see / limit[f'{kind}_ops_per_s']:.0%}" for kind in ("fp32", "int8")]
            table.append([name, f"{see / 1e9:.0f}", *shares, f"{statistics.median(work) / 1e6:.0f}"])
    head = ["", "vision, GFLOP/s", "of fp32", "of int8", "prefill, GFLOP/s"]
    return [*lines, *_table(head, table)] if table else lines


def _transformers(samples: Samples, model: str) -> list[str]:
    rows = pick(samples, "transformers", model)
    table = [[s["who"], s.get("error") or _spread([s], "ttft_ms"), _gib(s.get("peak_rss"))] for s in rows]
    said = "Hugging Face `generate` of one token on the checkpoint, its own image processor included."
    return [said, "", *_table(["type", "TTFT, ms", "peak, GiB"], table)] if rows else []


def _cold(samples: Samples, model: str) -> list[str]:
    table = [
        [s["build"], "checked" if s["hashes"] else "not checked", f"{s['import_ms']:.0f}", f"{s['open_ms']:.0f}",
         f"{s['answer_ms']:.0f}", f"{s['open_to_token_ms']:.0f}", _gib(s["peak_rss"])]
        for s in pick(samples, "cold", model)
    ]  # fmt: skip
    head = ["build", "hashes", "import, ms", "open, ms", "first token, ms", "open to token, ms", "peak, GiB"]
    said = "Fresh processes, a picture each; the files may be in the page cache."
    return [said, "", *_table(head, table)] if table else []


def _nano(samples: Samples, model: str) -> list[str]:
    rows = pick(samples, "nano", model)
    keys = {
        "TTFT": "ttft_ms",
        "inside ONNX Runtime": "ort_ms",
        "inside llama_decode": "llama_ms",
        "picture → RGB": "decode_image_ms",
        "all outside the engines": "overhead_ms",
        "the same by the caller's clock, queue and threads included": "overhead_by_clock_ms",
    }
    names = sorted({s["who"] for s in rows})
    groups = [pick(samples, "nano", model, name) for name in names]
    table = [[label, *(_spread(group, key) for group in groups)] for label, key in keys.items()]
    said = f"Warm, a new picture each time, build {rows[0]['build'] if rows else ''}; ms."
    return [said, "", *_table(["", *names], table)] if rows else []


def _spread(group: Samples, key: str) -> str:
    numbers = values(group, key)
    if not numbers:
        return ""
    low, middle, high = (_number(n) for n in (min(numbers), statistics.median(numbers), max(numbers)))
    return middle if len(numbers) == 1 else f"{middle} ({low}..{high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]]
