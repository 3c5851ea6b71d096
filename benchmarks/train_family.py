"""base, share, LoRA and QLoRA trained end to end at nano scale by the commands that train the 3 B models.

    python benchmarks/train_family.py --work DIR [--pictures 2000] [--runs base share lora qlora]
        [--out FOLDER] [--plot PNG]

Data are the demo's: easy-VQA's questions and captions, and generated scenes. Stage 1 is the same for all and trained
once. Every stage is one `tinyllava-edge train` command; one that was killed goes on when this is started again. The
last stage of each run is scored on all held-out easy-VQA questions: an answer counts when greedy decoding would write
it. Records and curves of every stage are kept in --out, the table is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tinyllava_edge.data import easy_vqa, scenes
from tinyllava_edge.files import new_directory

# run → stages after stage 1, as (recipe, stage)
RUNS = {
    "base": (("base-nano", "finetune"),),
    "share": (("share-nano", "share-pretrain"), ("share-nano", "finetune")),
    "lora": (("lora-nano", "finetune"),),
    "qlora": (("qlora-nano", "finetune"),),
}
CAPTIONS, ANSWERS = ("train_captions.json",), ("train_qa.json", "train_captions.json", "train.json")
KEPT = (".train.json", ".log.jsonl")


def make_data(out: Path, pictures: int) -> None:
    """The demo's data with the first pictures only."""
    with new_directory(out) as temporary:
        made = easy_vqa.convert(temporary)
        for path in (made.train_qa, made.train_captions):
            rows = json.loads(path.read_text(encoding="utf-8"))
            kept = set(list(dict.fromkeys(row["image"] for row in rows))[:pictures])
            path.write_text(json.dumps([row for row in rows if row["image"] in kept]), encoding="utf-8")
        scenes.write_split(temporary, 3 * pictures // 8, seed=1, split="train")


def train(data: Path, out: Path, recipe: str, stage: str, start: Path | None) -> list[str]:
    """One stage by the command line; returns the command."""
    captions = stage != "finetune"
    command = ["tinyllava-edge", "train", "--recipe", recipe, "--stage", stage, "-o", str(out)]
    command += ["--images", str(data / "images")]
    command += [] if captions else ["--eval-data", str(data / "test_qa.json")]
    for name in CAPTIONS if captions else ANSWERS:
        command += ["--data", str(data / name)]
    command += ["--checkpoint", str(start)] if start else []
    if not out.exists():
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
    return command


def table(records: dict[str, dict[str, Any]]) -> str:
    """A line a stage."""
    lines = [
        "| run | stage | parts | steps | minutes | pictures/s | loss, nats | held-out answers |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, record in records.items():
        run, _, stage = name.partition(" ")
        recipe, score = record["recipe"], record["score"]
        parts = ", ".join(f"{part} {recipe[part]}" for part in ("tower", "connector", "llm"))
        right = "" if score is None else f"{100 * score['exact'] / score['rows']:.2f} % of {score['rows']:,}"
        lines.append(
            f"| {run} | {stage} | {parts} | {record['steps']:,} | {record['seconds'] / 60:.1f} "
            f"| {record['images_per_s']:.0f} | {record['final_loss']:.3f} | {right} |"
        )
    return "\n".join(lines)


def plot(records: dict[str, dict[str, Any]], out: Path) -> None:
    """Loss of each stage over its steps, smoothed over 15."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, constrained_layout=True)
    for name, record in records.items():
        losses = record["losses"]
        smooth = [sum(losses[max(0, k - 14) : k + 1]) / min(15, k + 1) for k in range(len(losses))]
        axes[int("finetune" in name)].plot(range(1, len(smooth) + 1), smooth, label=name)
    for axis, title in zip(axes, ("captions (Eq. 1)", "answers (Eq. 3)"), strict=True):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per answer token")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Data, stage 1, every run, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where data and checkpoints are kept")
    parser.add_argument("--pictures", type=int, default=2000, help="easy-VQA training pictures, 4,000 at most")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--plot", type=Path, help="PNG of the loss curves")
    parser.add_argument("--out", type=Path, help="folder that records and curves are copied to")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "data"
    if not data.exists():
        make_data(data, args.pictures)
    done = {"all pretrain": args.work / "stage-1"}
    commands = [train(data, done["all pretrain"], "base-nano", "pretrain", None)]
    for run in args.runs:
        start = args.work / "stage-1"
        for recipe, stage in RUNS[run]:
            out = args.work / f"{run}-{stage}"
            commands.append(train(data, out, recipe, stage, start))
            done[f"{run} {stage}"] = start = out
    records = {
        name: json.loads((args.work / f"{out.name}.train.json").read_text(encoding="utf-8"))
        for name, out in done.items()
    }
    if args.plot:
        plot(records, args.plot)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for out in done.values():
            for suffix in KEPT:
                text = (args.work / f"{out.name}{suffix}").read_text(encoding="utf-8")
                (args.out / f"{out.name}{suffix}").write_text(text.replace(f"{args.work}/", ""), encoding="utf-8")
    for command in commands:
        print(" ".join(command).replace(f"{args.work}/", ""), file=sys.stderr)
    print(table(records))


if __name__ == "__main__":
    main()
