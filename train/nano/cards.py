"""Write the model cards of the nano backbones from their training.json.

python train/nano/cards.py tinyllava_edge/nano
"""

# ruff: noqa: E501  (the cards' own lines)
from __future__ import annotations

import argparse
import json
from pathlib import Path

TOWER = """# Nano {name} tower

A `{model}` of 2.1 million parameters: 64 x 64 pictures, 8 x 8 patches, width 192, 5 layers, 6 heads; float16.
TinyLLaVA reads `hidden_states[-2]`. It stands in for a real {name} where a whole run has to fit in minutes on a CPU.

**How it was made.** From random weights, by `train/nano/pretrain_tower.py --kind {kind} --steps {steps} --seed {seed}`
(AdamW, 1e-3 with cosine, bfloat16 autocast): {steps} steps of {batch} pictures in {minutes:.0f} minutes of wall clock on two
shared CPU cores. Linear heads, dropped afterwards, say per patch what covers it and what the picture holds.

**On what.** 150,000 pictures of our own generator (`tinyllava_edge/data/scenes.py`, split `train`) and easy-VQA's 4,000
training pictures (MIT), never its test pictures. No picture of the real world, and no text.

**Measured**, with the weights as shipped, on held-out pictures: accuracy (%) of the linear heads.

{table}

"Each patch" means: read off a single patch's feature, averaged over patches. "All pairs" needs all of 24 colour-shape pairs right.

**What it can't do.** See anything but flat shapes in eight colours, digits and lower-case letters. Its features say poorly
which character a patch shows, so numbers and words are hardly read; several objects of one picture are told apart less
well than a single one (compare the two columns).
"""

LLM = """# Nano language model

A `LlamaForCausalLM` of 2.9 million parameters: width 256, 4 layers, 4 heads and 2 key-value heads of 64, MLP 512, context
2,048, untied head; float16. Its tokenizer is a byte-level BPE of 1,024 tokens (GPT-2's splitting, every byte covered).

**How it was made.** From random weights, by `train/nano/make_tokenizer.py` and `train/nano/pretrain_lm.py --steps {steps} --seed
{seed}` (AdamW, 1.5e-3 with cosine, bfloat16 autocast): {steps} steps of {batch} described scenes with up to 8 questions each, in
{minutes:.0f} minutes of wall clock on two shared CPU cores, pauses included. It starts with one object and easy questions (see
`reading.py`), and a head, dropped afterwards, asks halfway up whether a question's colour or shape word is true.

**On what.** Text of our own generator (`tinyllava_edge/data/scene_text.py`, split `train`) in the prompt format of TinyLLaVA's
`llama` template. Where a picture will be there is a text, or an 8 x 8 grid whose cells are sums of word embeddings. No
pictures, no easy-VQA, no text from the web.

**Measured**, with the weights as shipped, on held-out described scenes: exact answers (%), teacher-forced.

{table}

Letter is multiple choice (chance 25), relation and left_right have two answers (chance 50). Grids and scenes are random, and
some cells are left out on purpose, so not every question can be answered.

**What it can't do.** Speak. It knows captions of the generator's scenes and one-word answers to its questions, in lower-case
English, and nothing of the world.
"""


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown, one row per name."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    head = f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n"
    return head + "\n".join(f"| {n} | {' | '.join(str(c.get(n, '')) for c in columns.values())} |" for n in names)


def main() -> None:
    """Write README.md beside every training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nano", type=Path)
    for path in sorted(parser.parse_args().nano.glob("*/training.json")):
        facts = json.loads(path.read_text())
        if path.parent.name == "llm":
            scores: dict[str, dict[str, float]] = {"text": {}, "grid": {}}
            for key, value in facts["described scenes (held out)"].items():
                mode, kind = key.split(": ")
                scores[mode][kind] = value
            card = LLM.format(**facts, table=table(scores))
        else:
            names = ("SigLIP", "SiglipVisionModel") if facts["kind"] == "siglip" else ("CLIP", "CLIPVisionModel")
            columns = {key: facts[key] for key in ("scenes (held out)", "easy-VQA test")}
            card = TOWER.format(**facts, name=names[0], model=names[1], table=table(columns))
        path.with_name("README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
