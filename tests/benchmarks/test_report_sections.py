"""The report's sections on results of two targets: what each says, what it refuses to mix, and that it escapes."""

from __future__ import annotations

import html.parser
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import report, report_draw, report_machine, report_plots, report_tables, report_time
from tinyllava_edge.benchmarks.model_card import model_card_section
from tinyllava_edge.benchmarks.quant_map import bits, quantisation_map, tensor_grids
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import Summary, summarise
from tinyllava_edge.errors import DataError

PI = "ssh://pi@raspberry:22/bench"
BUDGET = {"ttft_ms": 40.0, "peak_rss": 1.34e8, "size": 7e6, "drop": 0.5}


def rich(samples: list[Sample], seed: int = 7, pi: bool = True) -> list[Sample]:
    """The synthetic results as a newer `bench` writes them; with `pi` also on a board that is eight times slower."""
    rng = random.Random(seed)
    new: list[Sample] = []
    for sample in samples:
        detail = {**sample.detail, "run": "r1"} if sample.kind == "latency" and "cold" not in sample.stage else None
        new.append(replace(sample, detail=detail) if detail else sample)
        if sample.kind == "latency" and sample.stage == "ttft_ms":
            total = (sample.value or 0.0) + 55 * rng.lognormvariate(0, 0.02)
            steps = {"run": "r1", "token_ms": [5.0] * 11}
            new.append(replace(sample, stage="total_ms", value=total, detail=steps))
            new.append(replace(sample, stage="decode_ms", value=total - (sample.value or 0.0), detail={"run": "r1"}))
            new.append(replace(sample, stage="pp128", value=900 + sample.sample, unit="tokens/s", detail={"run": "r1"}))
        if sample.kind == "latency" and sample.stage == "prefill_ms":
            for stage, part in (("image_prefill_ms", 0.8), ("text_prefill_ms", 0.2)):
                new.append(replace(sample, stage=stage, value=part * (sample.value or 0.0)))
        if sample.kind == "memory":
            new += [replace(sample, stage=stage, value=part * (sample.value or 0)) for stage, part in
                    (("anon", 0.4), ("file", 0.6), ("after_load", 0.8))]  # fmt: skip
            new.append(replace(sample, kind="energy", stage="answer", value=None, unit="J",
                               detail={"reason": "RAPL: permission denied"}))  # fmt: skip
    hot = {
        "temperature_c": {"cpu": 71.0},
        "cpu_mhz": {"cpu0": 1500.0},
        "governor": "ondemand",
        "load_average": [0.2] * 3,
    }
    for stage, count in (("before", 0), ("after", 3)):
        new.append(Sample("condition", "", "", stage, target="cpu", detail={"load_average": [0.3, 0.2, 0.1]}))
        new.append(Sample("condition", "", "", stage, target=PI, detail={**hot, "throttle_counts": {"core": count}}))
    for name, value, unit in (("read_gb_per_s", 11.0, "GB/s"), ("gemm_f32_gflop_per_s", 96.0, "GFLOP/s")):
        new.append(Sample("ceiling", "", "", name, value, unit, 0, "e1"))
    missing = {"reason": "ONNX Runtime refused MatMulInteger"}
    new.append(Sample("ceiling", "", "", "gemm_int8_gop_per_s", None, "GOP/s", 0, "e1", detail=missing))
    builds = list(dict.fromkeys(s.build for s in samples if s.runtime == "edge"))
    for build in builds:
        for cause, scale in (("vision", 1e-4), ("llm", 3e-3), ("both", 3.2e-3)):
            for k in range(12):
                kl = [scale * rng.lognormvariate(0, 1) for _ in range(3)]
                detail = {"id": f"q{k}", "image": f"test-{k // 6}.png", "task": "", "positions": 3, "same_top": 2,
                          "kl": kl, "moved": [-0.01, 0.0, 0.002], "margins": [0.05]}  # fmt: skip
                new.append(Sample("divergence", "edge", build, cause, sum(kl) / 3, "nats", k, "e1", detail=detail))
    if pi:
        machine = next(s for s in samples if s.kind == "environment")
        board = {**machine.detail, "cpu": {**machine.detail["cpu"], "model": "Cortex-A76", "flags": ["asimddp"]}}
        new.append(replace(machine, environment_id="e2", target=PI, detail=board))
        moved = [s for s in new if s.kind in ("latency", "memory", "energy") and s.runtime == "edge"]
        for sample in moved:
            value = sample.value
            if sample.kind == "energy":
                value, detail = 4.2 + 0.1 * rng.random(), {"source": "hwmon: VDD_IN"}
                new.append(replace(sample, target=PI, environment_id="e2", value=value, detail=detail))
            elif sample.kind == "latency":
                factor = 1 / 8 if sample.unit == "tokens/s" else 8 * (1.0 if "fp32" in sample.build else 0.9)
                new.append(replace(sample, target=PI, environment_id="e2", value=(value or 0.0) * factor))
            else:
                new.append(replace(sample, target=PI, environment_id="e2"))
    new.append(Sample("command", detail={"command": f"tinyllava-edge bench BUNDLE --target {PI} -o results.jsonl"}))
    return new


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


@pytest.fixture(scope="module")
def two(samples: list[Sample]) -> list[Sample]:
    return rich(samples)


@pytest.fixture(scope="module")
def summary(two: list[Sample]) -> Summary:
    return summarise(two, BUDGET)


@pytest.fixture(scope="module")
def text(two: list[Sample], summary: Summary) -> str:
    return Page(report.html(two, summary, command="tinyllava-edge report results.jsonl")).text


def test_targets_are_never_pooled(two: list[Sample], samples: list[Sample], summary: Summary) -> None:
    alone = {row.build: row for row in summarise(rich(samples, pi=False)).builds}
    assert summary.targets == ("cpu", PI) and len(summary.builds) == 10
    for row in summary.builds:
        assert row.samples == 15 and row.ttft is not None and row.runs == 1
        if row.target == "cpu":
            assert row.ttft == alone[row.build].ttft and row.label == f"{row.build} on cpu"
        else:
            slow, quick = row.ttft.estimate, alone[row.build].ttft
            assert quick is not None and slow > 6 * quick.estimate
            assert row.bytes == alone[row.build].bytes and row.verified  # the build's own, wherever it was measured
            assert row.answered_on == "cpu" and row.accuracy == alone[row.build].accuracy
    assert alone["int8+q8_0"].label == "int8+q8_0"


def test_each_target_has_a_decision(summary: Summary, text: str) -> None:
    here, there = summary.decisions
    assert summary.decision is here and (here.target, there.target) == ("cpu", PI)
    assert here.build == "int8+q8_0" and there.build is None
    assert there.rejected["int8+q8_0"] == "time to first token 127 ms, allowed 40.0 ms"
    assert text.index("For this budget, on cpu") < text.index("Ship int8+q8_0") < text.index("Ship none of these")
    assert "peak memory ≤ 134 MB" in text and "time to first token ≤ 40.0 ms" in text


def test_runs_with_other_settings_are_left_out(samples: list[Sample]) -> None:
    """A second `bench` with another picture, or on other threads, appended to the same file."""
    mine = rich(samples, pi=False)
    times = [s for s in mine if s.kind == "latency" and s.detail.get("run")]
    picture = [
        replace(s, value=9 * (s.value or 0), detail={**s.detail, "run": "r2", "image_size": "640x480"}) for s in times
    ]
    row, before = (summarise(found).builds[0] for found in ([*mine, *picture], mine))
    assert (row.ttft, row.stages, row.left_out, row.runs) == (before.ttft, before.stages, 1, 1)
    machine = next(s for s in mine if s.kind == "environment")
    four = replace(machine, environment_id="e4", detail={**machine.detail, "runtime": {"n_threads": 4}})
    threads = [replace(s, environment_id="e4", value=0.3 * (s.value or 0)) for s in times]
    row = summarise([*mine, four, *threads]).builds[0]
    assert (row.ttft, row.left_out) == (before.ttft, 1)
    again = [replace(s, detail={**s.detail, "run": "r2"}) for s in times]
    row = summarise([*mine, *again]).builds[0]
    assert (row.samples, row.runs, row.left_out) == (30, 2, 0)  # the same settings: pooled, and said
    pooled = summarise([*mine, *again])
    said = Page(report.html([*mine, *again], pooled)).text
    assert "fp32+f16 pools 2 runs" in said and "up to 2 runs are pooled" in said and "within one run" not in said
    card = model_card_section(pooled)
    assert "up to 2 runs pooled" in card and "within one run" not in card
    alone = summarise(mine)
    assert "within one run" in Page(report.html(mine, alone)).text and "within one run" in model_card_section(alone)


def test_every_number_of_threads_is_shown(samples: list[Sample]) -> None:
    """One machine, an evaluation on four threads and a measurement on two; its container's limits and engines."""
    machine = next(s for s in samples if s.kind == "environment")
    limits = {"cpu": "150000 100000", "memory": "2000000000"}
    runtime = {**machine.detail["runtime"], "ggml_commit": "fe9c9ee", "ggml_version": "0.9.1"}
    first = replace(machine, detail={**machine.detail, "limits": limits, "runtime": runtime})
    second = replace(
        first, environment_id="e4", detail={**first.detail, "runtime": {**runtime, "n_threads": 4, "kv_cache": "f16"}}
    )
    (found,) = report_machine.machines([first, second, first])
    told = "threads 2 or 4; key-value cache f16; providers CPUExecutionProvider"
    assert found["runtimes"] == {"edge runtime": told, "llama.cpp": "commit fe9c9ee; ggml 0.9.1"}
    lines = [first, second, *(s for s in samples if s.kind in ("latency", "size"))]
    limited = "memory 2,000 MB, processor 1.5 cores"
    assert f"<dt>container limits</dt><dd>{limited}</dd>" in report.html(lines, summarise(lines))
    card = model_card_section(summarise(lines))
    assert f"container limits: {limited}" in card and "llama.cpp commit fe9c9ee" in card
    assert report_machine.bounds({"cpu": None, "memory": "x"}) == report_machine.bounds(7) == "none"


def test_plots_of_what_was_measured(summary: Summary) -> None:
    found = report_plots.plots(summary)
    assert [(plot.name, plot.target) for plot in found] == [
        ("ttft", "cpu"), ("total", "cpu"), ("size", "cpu"), ("memory", "cpu"),
        ("t1-ttft", PI), ("t1-total", PI), ("t1-memory", PI), ("t1-energy", PI),
    ]  # fmt: skip
    assert [plot.limit for plot in found[:4]] == [40.0, None, 7.0, 134.0]
    key = report_plots.Key.of(found)
    assert set(key.colors) == {"f16", "q8_0", "q4_k_m"} and len(set(key.colors.values())) == 3
    energy = ET.fromstring(report_draw.svg(found[-1], key))
    titles = [node.text or "" for node in energy.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0].startswith("fp32+f16: 96.0 % (94.1 to 97.3), 4.2") and titles[0].endswith(" J")


def test_waterfall_splits_prefill_and_ends_with_decoding(two: list[Sample], summary: Summary) -> None:
    table = report_time.waterfall(summary.builds, {("cpu", "fp32+f16", "vision_ms"): 23.4})
    names = [bar["name"] for bar in table[0]["bars"]]
    assert names == ["decode image", "preprocess", "vision", "image prefill", "text prefill", "sample", "decode"]
    assert [bar["share"] for bar in table[0]["bars"]].count(23.4) == 1
    for target in ("cpu", PI):
        ends = [row["bars"][-1]["left"] + row["bars"][-1]["width"] for row in table if row["row"].target == target]
        assert max(ends) == pytest.approx(100)
    unsplit = [s for s in two if s.stage != "image_prefill_ms"]
    names = [bar["name"] for bar in report_time.waterfall(summarise(unsplit).builds, {})[0]["bars"]]
    assert "prefill" in names and "text prefill" not in names


def test_roofline_shares_reach_the_page(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = rich(samples, pi=False)
    assert report_time.roofline_shares(mine) == {}  # these results recorded no work
    shares = {("cpu", "fp32+f16", "vision_ms"): 31.4, ("cpu", "fp32+f16", "decode_ms"): 250.0}
    monkeypatch.setattr(report_time, "roofline_shares", lambda _: shares)
    text = Page(report.html(mine, summarise(mine))).text
    assert "31.4 %" in text and "250 %" in text and "share of the roofline" in text


def test_scatter_is_starred_where_it_was_measured(samples: list[Sample]) -> None:
    mine = [
        replace(s, value=(s.value or 0) * (1 + s.sample % 2)) if s.build == "int8+q8_0" and s.stage == "total_ms" else s
        for s in rich(samples, pi=False)
    ]
    summary = summarise(mine)
    row = next(row for row in summary.builds if row.build == "int8+q8_0")
    assert row.scatters("total_ms") and not row.noisy and row.variation["total_ms"] > 0.3
    source = report.html(mine, summary)
    assert source.count('title="coefficient of variation') >= 1 and "coefficient of variation over 10 %" in source
    assert "\\*" in report_tables.markdown_table(summary)


def test_energy_conditions_and_ceilings_say_what_is_missing(two: list[Sample], summary: Summary, text: str) -> None:
    assert "RAPL: permission denied (5 builds)" in text and "hwmon: VDD_IN" in text
    here, there = report_machine.conditions(two)
    assert (here["throttled"], there["throttled"]) == (None, True)
    assert there["temperature"] == "71 → 71 °C" and here["temperature"] == "–" and here["load"] == "0.30 → 0.30"
    assert "int8 matrix product not measured (ONNX Runtime refused MatMulInteger)" in text
    assert "energy of an answer" not in str([plot for plot in report_plots.plots(summary) if plot.target == "cpu"])


@pytest.mark.parametrize("detail", [
    {"temperature_c": "hot", "cpu_mhz": [None, True], "load_average": 7, "governor": ["x"], "gpu": ["no", 3]},
    {"throttle_counts": {"core": "many"}, "gpu": {"a": 1}},
    {},
])  # fmt: skip
def test_odd_conditions_are_unknown(detail: dict[str, object]) -> None:
    lines = [Sample("condition", "", "", stage, detail=detail) for stage in ("before", "after")]
    (found,) = report_machine.conditions(lines)
    assert found["throttled"] is None and found["temperature"] == "–"
    assert len(report_machine.conditions(lines[:1])) == 1 and report_machine.conditions(lines[1:])


def test_divergence_by_cause(two: list[Sample], text: str) -> None:
    (table,) = report_tables.divergence(two)
    assert table["names"] == ["vision", "language model", "both"] and len(table["rows"]) == 5
    assert all(row["cells"][0].mean < row["cells"][1].mean for row in table["rows"])
    assert "What moves the answers" in text and "same word 66.67 %" in text
    broken = [replace(s, detail={**s.detail, "kl": "?"}) if s.kind == "divergence" else s for s in two]
    with pytest.raises(DataError, match="kl"):
        report.html(broken, summarise(broken))


def test_comparison_with_the_reference(two: list[Sample], summary: Summary, text: str) -> None:
    found = report_tables.comparison(two, summary)
    assert [line["row"].build for line in found["rows"]] == [row.build for row in summary.builds[:5]]  # not twice
    worst = found["rows"][-1]["pair"]
    assert worst.verdict == "worse" and worst.p_holm == pytest.approx(5 * worst.p_value)
    assert "corrected for 5 comparisons" in text
    torn = [s for s in two if not (s.kind == "answer" and s.build == "int8+f16" and s.detail["id"] == "q5")]
    mine = [replace(s, detail={**s.detail, "task": "t"}) if s.kind == "answer" else s for s in torn]
    extra = [s for s in two if s.kind == "answer"]  # the task that the summary counts comes first and is whole
    assert "q5" in report_tables.comparison([*extra, *mine], summary)["absent"][0]


def test_quantisation_map(samples: list[Sample]) -> None:
    rows = quantisation_map(samples, ["int8+q4_k_m", "fp32+q4_k_m", "none+none"])
    assert [row.build for row in rows] == ["int8+q4_k_m", "fp32+q4_k_m"]
    vision, llm = rows[0].parts
    assert (vision.role, llm.role) == ("vision", "llm") and llm.path == "llm-q4_k_m.bin"
    assert [(s.type, s.count, s.shade) for s in llm.segments] == [("F16", 12, "b16"), ("Q6_K", 3, "b6")]
    assert llm.segments[1].left == pytest.approx(80) and llm.segments[1].width == pytest.approx(20)
    names = ("F32", "float", "BF16", "float16", "Q8_0", "int8", "uint8", "Q6_K", "Q5_K", "IQ4_XS", "q3_k", "TQ1_0")
    assert [bits(name) for name in names] == [32, 32, 16, 16, 8, 8, 8, 6, 5, 4, 3, 1]
    assert [bits(name) for name in ("int64", "bool", "", "<b>", "q" * 99, "int32", "double")] == [0, 0, 0, 0, 0, 0, 64]
    odd = {"files": [None, 3, {"role": "llm", "precision": "f16", "tensor_types": {"F16": -1, "x": "y", "z": True}}]}
    assert quantisation_map([Sample("bundle", detail=odd), Sample("bundle", detail={"files": 7})], ["int8+f16"]) == []


SPREAD = {"f32": [f"k{n}.{n % 500}.w" for n in range(15_000)]}  # every tensor a kind of its own


def test_grid_of_tensors() -> None:
    """Tensors by kind and layer; what belongs to no layer beside them; names of another machine are bounded."""
    tensors = {
        "q4_k": ["blk.0.attn_v.weight", "blk.10.attn_q.weight", "token_embd.weight"],
        "q6_k": ["blk.10.attn_v.weight", "output.weight"],
        "f32": ["blk.0.attn_norm.weight"],
    }
    file = {"role": "llm", "precision": "q4_k_m", "path": "llm.gguf", "tensor_types": {"q4_k": 3}, "tensors": tensors}
    line = Sample("bundle", detail={"files": [file]})
    (grid,) = tensor_grids([line], ["fp32+q4_k_m", "int8+q4_k_m"])
    assert grid.layers == (0, 10) and [name for name, _ in grid.kinds] == [
        "attn_norm.weight",
        "attn_q.weight",
        "attn_v.weight",
    ]
    assert [[cell and (cell.type, cell.shade) for cell in cells] for _, cells in grid.kinds] == [
        [("f32", "b32"), None],
        [None, ("q4_k", "b4")],
        [("q4_k", "b4"), ("q6_k", "b6")],
    ]
    assert [(name, cell.type) for name, cell in grid.others] == [
        ("output.weight", "q6_k"),
        ("token_embd.weight", "q4_k"),
    ]
    (row,) = quantisation_map([line], ["int8+q4_k_m"])
    assert {s.type: s.count for s in row.parts[0].segments} == {"q4_k": 3, "q6_k": 2, "f32": 1}
    assert bits("w4") == 4 and bits("w8") == 8
    for odd in (7, {"f32": 7}, {"f32": [7, "", "x" * 201]}, {"f32": [f"t{n}" for n in range(20_001)]}, SPREAD):
        assert tensor_grids([Sample("bundle", detail={"files": [{**file, "tensors": odd}]})], ["int8+q4_k_m"]) == []


def test_commands_and_pages_of_little(two: list[Sample], text: str) -> None:
    assert f"tinyllava-edge bench BUNDLE --target {PI} -o results.jsonl" in text
    assert text.index("Every command") < text.index("tinyllava-edge report results.jsonl")
    for kinds in (("energy",), ("condition", "ceiling"), ("divergence",), ("latency", "command"), ("bundle", "size")):
        some = [s for s in two if s.kind in kinds]
        assert "Ship none" in Page(report.html(some, summarise(some, BUDGET))).text


def test_hostile_strings_stay_text(two: list[Sample]) -> None:
    evil = "<script>alert(1)</script>\"'><img src=http://x/y onerror=alert(2)>$x^{2$&amp;{{ 7*7 }}"

    def poison(sample: Sample) -> Sample:
        sample = replace(sample, build=sample.build.replace("q8_0", evil), target=sample.target.replace(PI, evil))
        if sample.kind == "energy":
            return replace(sample, detail={"reason": evil, "source": evil})
        if sample.kind == "condition":
            return replace(sample, detail={"governor": evil, "temperature_c": {evil: 3}})
        if sample.kind == "ceiling":
            return replace(sample, stage=evil, unit=evil, value=None, detail={"reason": evil})
        if sample.kind == "bundle":
            files = [{**file, "tensor_types": {evil: 3, "F16": 2}} for file in sample.detail["files"]]
            return replace(sample, detail={**sample.detail, "files": files})
        if sample.kind == "latency" and sample.stage == "pp128":
            return replace(sample, stage=f"pp128@{evil}")
        return sample

    poisoned = [poison(sample) for sample in two]
    summary = summarise(poisoned, BUDGET)
    page = Page(report.html(poisoned, summary, command=evil))
    assert not {"script", "img", "iframe"} & set(page.tags) and not [name for name in page.names if name[:2] == "on"]
    assert page.text.count("<script>alert(1)</script>") > 40 and "{{ 7*7 }}" in page.text
    card = model_card_section(summary)
    assert "<script" not in card and "<img" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len({line.count("|") - 2 * line.count("\\|") for line in rows}) == 1


def test_model_card(summary: Summary, samples: list[Sample]) -> None:
    card = model_card_section(summary)
    assert card.startswith("## Measured\n\nShip **int8+q8_0** on cpu for a budget of time to first token ≤ 40.0 ms")
    assert "Ship **none of these builds** on ssh://pi@raspberry:22/bench" in card
    assert "| **int8+q8_0 on cpu** | yes | 96.0 %" in card and "### Environment" in card
    assert (
        "600 questions, exact match" in card and "medians of 15 answers" in card and "RAPL: permission denied" in card
    )
    assert f"- {PI}: Cortex-A76, 2 cores, 24 GB" in card
    alone = model_card_section(summarise(samples), level=3)
    assert alone.startswith("### Measured\n\nShip **int8+q8_0**. It is the smallest of 4 builds")
    assert "- int8+q4_k_m: loses 3.0 points of accuracy" in alone and "- Example CPU, 2 cores" in alone
    assert model_card_section(summarise([])) == ""
    bare = [Sample("environment", detail={"cpu": 3, "libraries": [], "memory_bytes": "x"}), *samples[2:]]
    assert "unnamed processor" in model_card_section(summarise(bare))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(scheme: str) -> None:
    """WCAG AA: 4.5:1 for text, 3:1 for marks in plots and bars."""
    css = (Path(report.__file__).parent / "report.css").read_text(encoding="utf-8")
    parts = re.split("@media", css)[:2]
    light, dark = (dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", part)) for part in parts)
    colors = light if scheme == "light" else light | dark

    def luminance(color: str) -> float:
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for behind in ("page", "panel", "good-soft", "bad-soft"):
        for words in ("ink", "soft", "good", "bad"):
            assert contrast(colors[words], colors[behind]) >= 4.5, (words, behind)
    assert all(contrast(colors[f"series{k}"], colors["page"]) >= 3 for k in range(6))
    assert contrast(colors["ink"], colors["meter"]) >= 4.5
    for bit, back, words in re.findall(r"\.b(\d+) \{ background: (#\w{6}); color: (#\w+);", css):
        assert contrast(words if len(words) == 7 else "#ffffff", back) >= 4.5, bit


def test_a_real_measurement_fills_the_page(tiny_bundle: Path) -> None:
    """What `bench` of today writes: split prefill, shares of the roofline, tests by llama-bench's names, conditions."""
    from tinyllava_edge.benchmarks.latency import bench

    decoder = {"prompt_tokens": (8,), "gen_tokens": (4,)}
    samples = bench(tiny_bundle, repetitions=3, max_tokens=4, image_sizes=(64,), **decoder, memory=False)
    summary = summarise(samples, {"ttft_ms": 1e6})
    page = Page(report.html(samples, summary))
    row = summary.builds[0]
    assert row.total is not None and row.ttft is not None and row.total.estimate >= row.ttft.estimate
    assert row.energy or row.energy_notes
    for words in ("pp8", "tg4", "image prefill", "text prefill", "decode", "share of the roofline", "Before and after"):
        assert words in page.text, words
    assert "Without a share: " in page.text and "the file's compression decides" in page.text
    assert report_time.roofline_shares(samples)["cpu", row.build, "vision_ms"] > 0
    assert len(report_machine.conditions(samples)) == 1
    again = bench(tiny_bundle, repetitions=3, max_tokens=4, memory=False)  # a picture of 64 x 64 by default
    alone = bench(tiny_bundle, repetitions=2, **decoder, memory=False)
    row = summarise([*samples, *again, *alone]).builds[0]
    assert (row.samples, row.runs, row.left_out) == (6, 2, 0)
    assert "pp8" in Page(report.html(alone, summarise(alone))).text
