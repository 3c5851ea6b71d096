"""Pretrain the nano language model from scratch: reading comprehension of described scenes, in the final prompt format.

    python train/nano/make_tokenizer.py --out tinyllava_edge/nano/llm
    python train/nano/pretrain_lm.py --steps 2400 --seed 3 --out tinyllava_edge/nano/llm

It never sees a picture: text, or a grid of summed word embeddings, stands where the 64 image embeddings will be.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import SAVE_EVERY, Clock, load_state, optimizer_for, save_state, set_rate
from reading import Example, Reader, collate, read_many, visible
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tinyllava_edge.data.scene_text import TIERS
from tinyllava_edge.data.scenes import scene_seed

KINDS = (*TIERS, "caption")
MIDDLE = 2  # layers below the truth head
LEVEL_ENDS = (0.1, 0.35, 1.0)  # share of the run at which each level ends
WINDOW = 8  # steps
NOISE = 0.3  # of an embedding's own spread, on grid cells


def new_lm() -> LlamaForCausalLM:
    """Random weights."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # faster than SDPA's backward on CPU with a dense mask
    return LlamaForCausalLM(config)


def embed(lm: LlamaForCausalLM, batch: dict[str, Tensor], noise: float) -> Tensor:
    """(B, T, 256): sums of word embeddings; grid cells are scaled, and noisy while training."""
    words = batch["words"]
    table = lm.get_input_embeddings().weight
    known = (words >= 0).unsqueeze(-1)
    vectors = (F.embedding(words.clamp(min=0), table) * known).sum(2)
    cell = batch["cells"].unsqueeze(-1)
    vectors = torch.where(cell, vectors * batch["scale"].view(-1, 1, 1), vectors)
    if noise:
        vectors = vectors + torch.randn_like(vectors) * (noise * table.detach().std()) * cell
    return vectors


class Pupil(nn.Module):
    """The LM, and a head that asks, halfway up, whether a question's colour or shape word is true of the scene.

    The head is dropped afterwards. Without it, yes/no questions stay at chance for thousands of steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lm = new_lm()
        self.truth = nn.Linear(self.lm.config.hidden_size, 1)


def answers(
    lm: LlamaForCausalLM, batch: dict[str, Tensor], noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (N, 1024), targets (N,), flat indices (N,) of the places with a loss weight; middle states (B, T, 256)."""
    out = lm.model(
        inputs_embeds=embed(lm, batch, noise),
        attention_mask=visible(batch["groups"]),
        position_ids=batch["positions"],
        use_cache=False,
        output_hidden_states=True,
    )
    # A place is predicted from the one before it; a turn without a question starts from the prefix's last place.
    place = batch["weights"].flatten().nonzero().squeeze(1)
    logits = lm.lm_head(out.last_hidden_state.flatten(0, 1)[place - 1])
    return logits, batch["words"][..., 0].flatten()[place], place, out.hidden_states[MIDDLE]


def pick(examples: list[Example], seed: int, step: int, size: int) -> list[Example]:
    """The step's batch; WINDOW steps share a draw that is sorted by length, so that little is padding."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // WINDOW)
    drawn = torch.randint(len(examples), (size * WINDOW,), generator=generator).tolist()
    order = torch.randperm(WINDOW, generator=generator).tolist()
    drawn.sort(key=lambda i: len(examples[i].positions))
    start = order[step % WINDOW] * size
    return [examples[i] for i in drawn[start : start + size]]


@torch.no_grad()
def probe(lm: LlamaForCausalLM, tokenizer: Path, count: int = 1000) -> dict[str, float]:
    """Exact answers (%) per tier on held-out scenes, teacher-forced, from text and from grids."""
    reader, out = Reader(Tokenizer.from_file(str(tokenizer))), {}
    for mode in ("text", "grid"):
        hits: dict[str, list[bool]] = {}
        examples = [reader.example(scene_seed("eval", 1, i), KINDS, mode=mode) for i in range(count)]
        for start in range(0, count, 50):
            batch = collate(examples[start : start + 50])
            logits, targets, place, _ = answers(lm, batch)
            right = torch.ones(batch["weights"].numel(), dtype=torch.bool)
            right[place] = logits.argmax(-1) == targets
            right = right.view_as(batch["groups"])
            for k in range(1, int(batch["groups"].max()) + 1):
                here = (batch["groups"] == k) & (batch["tiers"] >= 0)
                for row in here.any(1).nonzero().squeeze(1):
                    kind = KINDS[int(batch["tiers"][row][here[row]][0])]
                    hits.setdefault(kind, []).append(bool(right[row][here[row]].all()))
        out |= {f"{mode}: {kind}": round(100 * sum(hits[kind]) / len(hits[kind]), 2) for kind in KINDS if kind in hits}
    return out


def save_lm(lm: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Write the LM in Hugging Face layout as float16; returns one with the weights that were written."""
    kept = copy.deepcopy(lm).eval().half()
    kept.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    kept.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    return kept.float()


def main() -> None:
    """Train, save, probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier, after this long; 0 for no limit")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--batch", type=int, default=24, help="described scenes per step, each with up to 8 turns")
    parser.add_argument("--scenes", type=int, default=60_000, help="described once, at the start")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=None, help="directory to resume from and to save the state in")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    first = scene_seed("train", args.seed, 0)
    tokenizer = args.out / "tokenizer.json"
    levels = []
    for level, count in enumerate((args.scenes // 6, args.scenes // 3, args.scenes)):
        seeds = range(first + level * args.scenes, first + level * args.scenes + count)
        levels.append(read_many(str(tokenizer), KINDS, level, seeds, args.threads))
    print(f"{' + '.join(str(len(e)) for e in levels)} described scenes ready", flush=True)
    pupil = Pupil()
    lm = pupil.lm
    optimizer, clock = optimizer_for(pupil), Clock(args.steps, args.minutes)
    if args.state and load_state(args.state, pupil, optimizer, clock):
        print(f"resumed at step {clock.step}", flush=True)
    saved, smooth, right = clock.elapsed, 0.0, dict[int, float]()
    while clock.progress < 1:
        level = next(k for k, end in enumerate(LEVEL_ENDS) if clock.progress < end)
        batch = collate(pick(levels[level], args.seed, clock.step, args.batch))
        set_rate(optimizer, clock.rate(args.lr))
        asks = batch["truths"] >= 0
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, place, middle = answers(lm, batch, NOISE)
            believed = pupil.truth(middle[asks]).squeeze(-1)
        weights = batch["weights"].flatten()[place]
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        asked = weights == 1
        loss = (each * weights).sum() / weights[asked].sum()
        if len(believed):
            loss = loss + 0.3 * F.binary_cross_entropy_with_logits(believed.float(), batch["truths"][asks].float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        clock.step += 1
        told = each[asked].mean().item()
        smooth = told if clock.step == 1 else 0.95 * smooth + 0.05 * told
        tiers, hits = batch["tiers"].flatten()[place], (logits.argmax(-1) == targets).float()
        for k in tiers[(tiers >= 0) & (targets != 2)].unique().tolist():
            now = hits[(tiers == k) & (targets != 2)].mean().item()
            right[k] = 0.95 * right.get(k, now) + 0.05 * now
        if clock.step % 50 == 0:
            tops = " ".join(f"{KINDS[k]} {100 * v:.0f}" for k, v in sorted(right.items()))
            print(f"{clock.line(smooth, args.batch, 'scenes')}  level {level}: {tops}", flush=True)
        if clock.elapsed - saved > SAVE_EVERY:
            saved = clock.elapsed
            save_lm(lm, args.out)
            if args.state:
                save_state(args.state, pupil, optimizer, clock)
    kept, trained = save_lm(lm, args.out), clock.elapsed
    report = {
        "seed": args.seed, "steps": clock.step, "batch": args.batch, "minutes": trained / 60,
        "described scenes (held out)": probe(kept, tokenizer),
    }  # fmt: skip
    print(json.dumps(report, indent=1), flush=True)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
