"""Questions a second: our batched evaluation beside one-by-one `generate` of stock transformers, same checkpoint.

    python benchmarks/eval_throughput.py CKPT BUNDLE [--questions 300] [--rounds 3] [--out FILE.json]

A ratio is that of one round, where both sides met the same machine; the median of the rounds is given with the lowest
and the highest. `publish.py` writes EVALUATION.md's table and README.md's sentence from the stored rates.

Both sides answer the same easy-VQA test questions greedily on the same cores, in turns, round after round. The peer
loads the checkpoint with stock LlavaForConditionalGeneration, runs its vision tower for every question and generates
with its KV cache, as a plain evaluation script does. Ours is `benchmarks.evaluation.evaluate` on the reference runtime
and on each build: it embeds a picture once and decodes its questions side by side. Answers are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.tasks.base import Question

BASE = "transformers generate"
Found = Mapping[str, Mapping[str, Any]]


def ratios(found: Found, name: str) -> list[float]:
    """Round by round, how many times as fast a side is as the peer in the same round."""
    pairs = zip(found[name]["questions_per_s"], found[BASE]["questions_per_s"], strict=True)
    return [mine / theirs for mine, theirs in pairs]


def row(found: Found, name: str) -> list[str]:
    """A side's cells: rate, ratio with the lowest and the highest of the rounds, equal answers."""
    side, of_rounds = found[name], ratios(found, name)
    ratio = f"{statistics.median(of_rounds):.1f} ({min(of_rounds):.1f} to {max(of_rounds):.1f})"
    rate = statistics.median(side["questions_per_s"])
    equal = f"{side['equal_answers']} of {side['questions']}"
    return [name, f"{rate:.1f}", "1" if name == BASE else ratio, equal]


def table(found: Found) -> str:
    """EVALUATION.md's table."""
    rows = [["side", "questions/s", f"ratio of a round, median of {rounds(found)} (range)", "answers equal"]]
    rows += [row(found, name) for name in found]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---|---:|---:|---:|", *lines[1:]]) + "\n"


def sentence(found: Found) -> str:
    """README.md's words."""
    sides = [ratios(found, name) for name in found if name != BASE]
    low, high = (choose(statistics.median(side) for side in sides) for choose in (min, max))
    least, most = min(map(min, sides)), max(map(max, sides))
    same = all(side["equal_answers"] == side["questions"] for side in found.values())
    return (
        f"Evaluation is {low:.1f} to {high:.1f} times as fast as one-by-one `generate` (medians of {rounds(found)} "
        f"rounds; single rounds on that busy machine {least:.1f} to {most:.1f})"
        + (", with the same answers." if same else ".")
    )


def rounds(found: Found) -> int:
    """Rounds that were measured."""
    return len(found[BASE]["questions_per_s"])


def peer(root: Path) -> Callable[[list[Question]], list[str]]:
    """Stock `generate`, one question at a time."""
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    from tinyllava_edge import checkpoint, prompt

    loaded = checkpoint.load(root)
    model = LlavaForConditionalGeneration.from_pretrained(root, dtype=torch.float32).eval()
    spec, tokenizer = loaded.spec, loaded.tokenizer
    processor = checkpoint.image_processor(spec)
    template = prompt.get_template(spec.template)
    marker = "<image>"

    @torch.inference_mode()
    def answer(questions: list[Question]) -> list[str]:
        texts = []
        for question in questions:
            text = prompt.render(prompt.build([prompt.Turn(question.prompt, images=1)], template), template)
            head, tail = text.split(marker)
            ids = tokenizer(head)["input_ids"]  # with the beginning-of-sequence token where the model wants one
            ids += [model.config.image_token_id] * spec.visual_tokens
            ids += tokenizer(tail, add_special_tokens=False)["input_ids"]
            pixels = processor(Image.open(question.pictures[0]).convert("RGB"), return_tensors="pt")["pixel_values"]
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pixels,
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=tokenizer.convert_tokens_to_ids(template.end_of_turn),
                pad_token_id=0,
            )
            texts.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
        return texts

    return answer


def main() -> None:
    """Measure and print."""
    from tinyllava_edge.benchmarks.evaluation import evaluate, sample_questions
    from tinyllava_edge.benchmarks.tasks import find
    from tinyllava_edge.bundle import read_bundle
    from tinyllava_edge.runtimes.edge import open_edge
    from tinyllava_edge.runtimes.reference import open_reference

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--builds", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = find("easy_vqa")
    questions = sample_questions(task.load(Path()), options.questions)
    builds = options.builds.split(",") if options.builds else list(read_bundle(options.bundle).builds())
    sides: dict[str, Callable[[list[Question]], list[str]]] = {BASE: peer(options.checkpoint)}
    runtimes = {"reference": open_reference(options.checkpoint)}
    runtimes |= {name: open_edge(options.bundle, name, allow_unverified=True) for name in builds}
    for name, runtime in runtimes.items():
        sides[name] = lambda asked, runtime=runtime: [r.given for r in evaluate(runtime, asked, task).records]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, list[str]] = {}
    for side in sides.values():
        side(questions[:8])
    for _ in range(options.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            answers[name] = side(questions)
            rates[name].append(len(questions) / (time.perf_counter() - start))
    found = {
        name: {
            "questions_per_s": rates[name],
            "equal_answers": sum(a == b for a, b in zip(answers[name], answers[BASE], strict=True)),
            "questions": len(questions),
            "pictures": len({question.image for question in questions}),
        }
        for name in sides
    }
    print(table(found), end="")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
