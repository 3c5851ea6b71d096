"""Does an importance matrix over pictures and text help? Three quantisations of each type, compared on answers.

    python benchmarks/imatrix_ab.py CHECKPOINT -o imatrix-ab.jsonl
    python benchmarks/imatrix_ab.py CHECKPOINT --data test.json --images DIR --calibrate train.json -o imatrix-ab.jsonl

Each type is quantised without a matrix, with one collected on the calibration conversations without their pictures,
and with one collected on the same conversations with them. Held-out conversations then run through llama.cpp, image
embeddings from torch, reference answers teacher-forced; at every answer position the next-token distribution is
compared with that of the float16 GGUF: Kullback-Leibler divergence (KLD) in nats, and whether the likeliest token is
the same.

Intervals are percentile bootstraps over pictures, because the questions on one picture aren't independent; the last two
columns resample the paired ratio to another file of the same type. Every row's raw values go to the JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.data.easy_vqa import package_data, questions
from tinyllava_edge.data.llava_json import Row, read
from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.export.calibrate import CalibrationData, calibration_rows, collect
from tinyllava_edge.export.imatrix import Imatrix, save_imatrix
from tinyllava_edge.export.llm import export_llm
from tinyllava_edge.export.llm_types import LLM_TYPES
from tinyllava_edge.export.quantize import quantize_gguf
from tinyllava_edge.prompt import Turn, get_template
from tinyllava_edge.runtimes.llama import MAX_SEQUENCES, Llama
from tinyllava_edge.train.collate import Encoder
from tinyllava_edge.train.pictures import Pixels

TYPES = ("q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "q2_k", "iq3_xxs", "iq2_xs")
MATRICES = ("none", "text", "image+text")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One held-out conversation, ready for the decoder."""

    id: str
    """the row's id"""
    picture: str
    """the row's picture, which resampling keeps together"""
    ids: npt.NDArray[np.int32]
    """(n,), image slots included"""
    embeds: npt.NDArray[np.float32]
    """(p, h): image embeddings from torch, float32"""
    first_slot: int
    """position of the first image embedding"""
    sources: tuple[int, ...]
    """positions whose next token belongs to the answer, at most 16"""


@dataclass(frozen=True)
class Score:
    """One row of one file against the float16 GGUF."""

    type: str
    """LLM type"""
    imatrix: str
    """one of MATRICES"""
    id: str
    """the row's id"""
    picture: str
    """the row's picture"""
    kld: tuple[float, ...]
    """nats, per answer position; the first is the first token's"""
    same_top: tuple[bool, ...]
    """per answer position: whether the likeliest token is the same"""


def main() -> None:
    """Collect, quantise, compare, print."""
    options = _options()
    loaded = checkpoint.load(options.checkpoint)
    calibration = calibration_rows(options.calibrate, options.calibrate_images or options.images, options.samples)
    test = _test_rows(options.data, options.images, options.rows)
    say(f"{len(calibration.rows)} rows of {calibration.name} to calibrate, {len(test.rows)} of {test.name} held out")
    cases = _cases(loaded, test)
    matrices: dict[str, Imatrix | None] = {"none": None}
    for name in MATRICES[1:]:
        matrices[name] = collect(loaded, calibration, text_only=name == "text")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = root / "f16.gguf"
        export_llm(loaded, base)
        wanted = _logits(base, cases, options.threads)
        scores: list[Score] = []
        sizes: dict[str, int] = {"f16": base.stat().st_size}
        for kind in options.types:
            for name, matrix in matrices.items():
                if matrix is None and LLM_TYPES[kind].needs_imatrix:
                    continue
                path = root / "quantised.gguf"
                quantize_gguf(base, path, kind, imatrix=matrix and save_imatrix(matrix, root / "imatrix.gguf"))
                sizes[f"{kind} {name}"] = path.stat().st_size
                scores += compare(kind, name, cases, wanted, _logits(path, cases, options.threads))
                say(f"{kind}, {name}: mean KLD {np.mean([v for s in scores[-len(cases) :] for v in s.kld]):.3g}")
    if options.output:
        head = {
            "model": loaded.spec.name,
            "calibration": calibration.name,
            "calibration_rows": len(calibration.rows),
            "image_share": matrices["image+text"].image_share if matrices["image+text"] else None,
            "held_out": test.name,
            "bytes": sizes,
        }
        lines = [json.dumps(head), *(json.dumps(asdict(score)) for score in scores)]
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(table(scores, sizes))


def compare(kind: str, matrix: str, cases: list[Case], wanted: list[Floats], found: list[Floats]) -> list[Score]:
    """Scores of one file: log-probabilities (positions, vocabulary) per case, of the float file and of this one."""
    scores = []
    for case, p, q in zip(cases, wanted, found, strict=True):
        kld = (np.exp(p) * (p - q)).sum(1)
        same = p.argmax(1) == q.argmax(1)
        scores.append(Score(kind, matrix, case.id, case.picture, tuple(kld.tolist()), tuple(same.tolist())))
    return scores


def table(scores: list[Score], sizes: dict[str, int], resamples: int = 2000) -> str:
    """Markdown: mean KLD with its interval, agreement, and the difference to no matrix."""
    lines = [
        "| type | matrix | MB | rows | tokens | KLD, first | KLD, answer [95 %] | same top | vs none | vs text |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(score.type for score in scores):
        of = {name: [s for s in scores if (s.type, s.imatrix) == (kind, name)] for name in MATRICES}
        for name in [name for name in MATRICES if of[name]]:
            mine = of[name]
            mean, low, high = interval(mine, resamples)
            changes = []
            for other in MATRICES[:2]:
                against = of[other] if MATRICES.index(other) < MATRICES.index(name) else []
                ratio, least, most = interval(mine, resamples, against) if against else (0.0, 0.0, 0.0)
                changes.append(f"{ratio:+.0%} [{least:+.0%}, {most:+.0%}]" if against else "")
            first = np.mean([score.kld[0] for score in mine])
            same = np.mean([value for score in mine for value in score.same_top])
            count = sum(len(score.kld) for score in mine)
            lines.append(
                f"| {kind} | {name} | {sizes[f'{kind} {name}'] / 1e6:.2f} | {len(mine)} | {count} | {first:.2e} "
                f"| {mean:.2e} [{low:.2e}, {high:.2e}] | {same:.2%} | {' | '.join(changes)} |"
            )
    return "\n".join(lines)


def interval(scores: list[Score], resamples: int, against: list[Score] | None = None) -> tuple[float, float, float]:
    """Mean KLD over answer positions with a bootstrap interval over pictures; with `against`, the relative change."""
    pictures = {name: k for k, name in enumerate(dict.fromkeys(score.picture for score in scores))}

    def sums(rows: list[Score]) -> Floats:
        total = np.zeros((len(pictures), 2))
        for row in rows:
            total[pictures[row.picture]] += (sum(row.kld), len(row.kld))
        return total

    def mean(table: Floats, draw: npt.NDArray[np.int64]) -> Floats:
        part = table[draw].sum(-2)
        return np.asarray(part[..., 0] / part[..., 1])

    draws = np.random.default_rng(0).integers(0, len(pictures), (resamples, len(pictures)))
    everything = np.arange(len(pictures))
    mine, theirs = sums(scores), None if against is None else sums(against)
    value, spread = mean(mine, everything), mean(mine, draws)
    if theirs is not None:
        value, spread = value / mean(theirs, everything) - 1, spread / mean(theirs, draws) - 1
    return float(value), float(np.quantile(spread, 0.025)), float(np.quantile(spread, 0.975))


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _test_rows(data: Path | None, images: Path | None, limit: int) -> CalibrationData:
    """Held-out rows with pictures, in even steps: of a file, or easy-VQA's test questions."""
    if data is not None:
        rows = [row for row in read(data, images or data.parent).rows if len(row.images) == 1]
        return CalibrationData(
            tuple(rows[k * len(rows) // min(limit, len(rows))] for k in range(min(limit, len(rows)))),
            images or data.parent,
            data.name,
        )
    asked = questions("test")
    picked = [asked[k * len(asked) // limit] for k in range(limit)]
    turns = [(number, Turn(f"<image>\n{question}", answer)) for question, answer, number in picked]
    found = tuple(Row(f"test-{k}", (f"{number}.png",), (turn,)) for k, (number, turn) in enumerate(turns))
    return CalibrationData(found, package_data() / "test" / "images", "easy-vqa test")


def _cases(loaded: checkpoint.Checkpoint, data: CalibrationData) -> list[Case]:
    spec, image_id = loaded.spec, loaded.model.config.image_token_id
    encoder = Encoder(loaded.tokenizer, get_template(spec.template), spec.visual_tokens, spec.max_length)
    pixels = Pixels(spec, data.images)
    cases = []
    with torch.inference_mode():
        for row in data.rows:
            encoded = encoder.encode(row)
            features = loaded.model.tower_features(pixels.pixels(row.image or "")[None])
            embeds = loaded.model.model.multi_modal_projector(features)[0].numpy()
            sources = tuple(int(k) - 1 for k in np.flatnonzero(encoded.is_answer))[:MAX_SEQUENCES]
            first = int(np.flatnonzero(encoded.ids == image_id)[0])
            cases.append(Case(row.id, row.image or "", encoded.ids, embeds, first, sources))
    return cases


def _logits(path: Path, cases: list[Case], threads: int) -> list[Floats]:
    """Log-probabilities (answer positions, vocabulary) of each case."""
    longest = max(len(case.ids) for case in cases)
    llama = Llama(path, n_ctx=longest + 1, n_threads=threads)
    found = []
    for case in cases:
        llama.clear()
        end = case.first_slot + len(case.embeds)
        before, after = case.ids[: case.first_slot].tolist(), case.ids[end : case.sources[-1] + 1].tolist()
        if before:
            llama.decode_tokens(before, range(len(before)))
        tail = [place - end for place in case.sources if place >= end]
        of_image = llama.decode_embeddings(
            case.embeds, len(before), wanted=[len(case.embeds) - 1] if len(tail) < len(case.sources) else []
        )
        of_text = llama.decode_tokens(after, range(end, end + len(after)), wanted=tail) if after else of_image[:0]
        logits = np.concatenate([of_image, of_text]).astype(np.float64)
        found.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    llama.close()
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(LLM_TYPES), metavar="TYPE")
    parser.add_argument("--data", type=Path, help="held-out LLaVA JSON; easy-VQA's test questions by default")
    parser.add_argument("--images", type=Path, help="directory of its pictures")
    parser.add_argument("--calibrate", type=Path, help="LLaVA JSON to calibrate on; easy-VQA's training questions")
    parser.add_argument("--calibrate-images", type=Path, help="directory of its pictures; --images by default")
    parser.add_argument("--samples", type=int, default=128, help="conversations to calibrate on")
    parser.add_argument("--rows", type=int, default=200, help="held-out conversations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="JSON lines with every row's values")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except TinyLlavaEdgeError as error:
        raise SystemExit(f"{error.message}\n{error.hint}") from error
