"""Pretrain a nano vision tower from scratch: dense labels on generated scenes and easy-VQA's training pictures.

    python train/nano/pretrain_tower.py --kind siglip --steps 4400 --seed 1 --out tinyllava_edge/nano/siglip
    python train/nano/pretrain_tower.py --kind clip --steps 2600 --seed 2 --out tinyllava_edge/nano/clip

Linear heads on hidden_states[-2], the layer that a TinyLLaVA reads, say for every patch what covers it, and what the
whole picture holds; the pooled output says the latter too, so that the last layer learns. Only the tower is kept.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import SAVE_EVERY, Clock, load_state, optimizer_for, save_state, set_rate
from labels import ATTRIBUTES, IGNORE, KINDS, MAX_OBJECTS, Pool, easy_vqa_pool, scene_pool
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tinyllava_edge.data.scene_text import COLORS, SHAPES

SHARED = {
    "image_size": 64, "patch_size": 8, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 5, "num_attention_heads": 6,
}  # fmt: skip
MEAN_STD = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
PAIRS = len(COLORS) * len(SHAPES)
TEXT = 3  # characters of the longest number or word
SUMMARY = {"pairs": PAIRS, "place": 3 * PAIRS, "count": MAX_OBJECTS + 1, "text": TEXT * ATTRIBUTES["character"]}


def new_tower(kind: str) -> nn.Module:
    """SiglipVisionModel or CLIPVisionModel with random weights."""
    if kind == "siglip":
        siglip = SiglipVisionConfig(**SHARED, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
        siglip._attn_implementation = "eager"  # twice as fast as SDPA's backward on CPU at 64 tokens
        return SiglipVisionModel(siglip)
    clip = CLIPVisionConfig(**SHARED, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=192)
    clip._attn_implementation = "eager"
    return CLIPVisionModel(clip)


class Pupil(nn.Module):
    """A tower and the heads that question it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.tower = new_tower(kind)
        width, self.skip = SHARED["hidden_size"], int(kind == "clip")
        self.norm = nn.LayerNorm(width)
        self.local = nn.Linear(width, sum(ATTRIBUTES.values()))
        self.summary = nn.Linear(width, sum(SUMMARY.values()))
        self.pooled = nn.Linear(width, sum(SUMMARY.values()))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 64, 64) -> per patch (B, 64, sum of ATTRIBUTES), summary per patch (B, 64, S), pooled (B, S)."""
        out = self.tower(pixel_values=pixels, output_hidden_states=True)
        features = self.norm(out.hidden_states[-2][:, self.skip :].float())
        return self.local(features), self.summary(features), self.pooled(out.pooler_output)


class Batches:
    """Pictures and labels on demand; easy-VQA's share of a batch is fixed."""

    def __init__(self, scenes: Pool, easy: Pool, kind: str, seed: int) -> None:
        self.pools = (scenes, easy)
        self.kind, self.seed = kind, seed

    def draw(self, step: int, size: int, easy: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch of `step`: pixels (B, 3, 64, 64), owners (B, 64), attributes (B, 1 + MAX_OBJECTS, 6)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        parts = []
        for pool, count in zip(self.pools, (size - easy, easy), strict=True):
            pick = torch.randint(len(pool.images), (count,), generator=generator).numpy()
            parts.append([torch.from_numpy(a[pick]) for a in (pool.images, pool.owners, pool.attributes)])
        images, owners, attributes = (torch.cat(column) for column in zip(*parts, strict=True))
        return normalise(images, self.kind), owners, attributes


def normalise(images: Tensor, kind: str) -> Tensor:
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) as the tower's preprocessing does."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD[kind])
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_labels(owners: Tensor, attributes: Tensor) -> Tensor:
    """(B, 64, 6): each patch's class per attribute."""
    index = owners.unsqueeze(-1).expand(-1, -1, attributes.shape[-1])
    return attributes.gather(1, index)


def summary_labels(attributes: Tensor) -> dict[str, Tensor]:
    """What the whole picture holds: pairs (B, 24), place (B, 24, 3) with IGNORE, count (B,), text (B, 3)."""
    batch = attributes.shape[0]
    shape, color = attributes[..., 0], attributes[..., 1]
    plain = (shape >= 1) & (shape <= len(SHAPES))
    pair = torch.where(plain, (color - 1) * len(SHAPES) + shape - 1, PAIRS)  # unused rows fall into an extra column
    pairs = torch.zeros(batch, PAIRS + 1).scatter_(1, pair, 1.0)[:, :PAIRS]
    place = torch.full((batch, PAIRS + 1, 3), IGNORE)
    where = attributes[..., 2:5]  # size, vertical, horizontal: 1 or 2, or IGNORE
    place.scatter_(1, pair.unsqueeze(-1).expand(-1, -1, 3), torch.where(where > 0, where - 1, IGNORE))
    return {
        "pairs": pairs,
        "place": place[:, :PAIRS],
        "count": plain.sum(1),
        "text": attributes[:, 1 : 1 + TEXT, 5],
    }


def local_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over attributes; covered and empty patches weigh the same in total."""
    covered, total = labels[..., 0] > 0, logits.new_zeros(())
    for k, part in enumerate(logits.float().split(list(ATTRIBUTES.values()), -1)):
        each = F.cross_entropy(part.transpose(1, 2), labels[..., k], ignore_index=IGNORE, reduction="none")
        here = covered & (labels[..., 0] == len(KINDS)) if k == 5 else covered
        total = total + each[here].sum() / here.sum().clamp(min=1) + each[~here].mean()
    return total / len(ATTRIBUTES)


def summary_loss(logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """`logits` (B, T, S): the same labels for each of the T tokens."""
    tokens = logits.shape[1]
    parts = dict(zip(SUMMARY, logits.float().split(list(SUMMARY.values()), -1), strict=True))
    pairs = labels["pairs"].unsqueeze(1).expand(-1, tokens, -1)
    loss = 4 * F.binary_cross_entropy_with_logits(parts["pairs"], pairs)  # 1 to 4 of 24 are true
    place = labels["place"].flatten(1).unsqueeze(1).expand(-1, tokens, -1)
    known = place != IGNORE
    loss = loss + F.binary_cross_entropy_with_logits(parts["place"][known], place[known].float())
    count = labels["count"].unsqueeze(1).expand(-1, tokens)
    loss = loss + F.cross_entropy(parts["count"].transpose(1, 2), count)
    text = labels["text"].unsqueeze(1).expand(-1, tokens, -1)
    spelled = parts["text"].unflatten(-1, (TEXT, -1)).permute(0, 3, 1, 2)
    return loss + 2 * F.cross_entropy(spelled, text)


@torch.no_grad()
def probe(pupil: Pupil, pool: Pool, kind: str, count: int = 2000) -> dict[str, float]:
    """Accuracy (%) of the linear heads on covered patches, and of the picture's summary read off one patch's mean."""
    right: dict[str, list[Tensor]] = {}
    for start in range(0, min(count, len(pool.images)), 250):
        rows = slice(start, start + 250)
        owners, attributes = torch.from_numpy(pool.owners[rows]), torch.from_numpy(pool.attributes[rows])
        local, summary, pooled = pupil(normalise(torch.from_numpy(pool.images[rows]), kind))
        labels, told = patch_labels(owners, attributes), summary_labels(attributes)
        for k, (name, part) in enumerate(zip(ATTRIBUTES, local.split(list(ATTRIBUTES.values()), -1), strict=True)):
            use = (labels[..., k] > 0) & (labels[..., 0] > 0)
            right.setdefault(f"patch {name}", []).append((part.argmax(-1) == labels[..., k])[use])
        right.setdefault("patch empty", []).append((local[..., : 1 + len(KINDS)].argmax(-1) == 0)[labels[..., 0] == 0])
        for where, logits in (("each patch", summary), ("pooled", pooled.unsqueeze(1))):
            parts = dict(zip(SUMMARY, logits.split(list(SUMMARY.values()), -1), strict=True))
            pairs = ((parts["pairs"] > 0) == (told["pairs"] > 0).unsqueeze(1)).all(-1)
            right.setdefault(f"{where}: all pairs", []).append(pairs.flatten())
            right.setdefault(f"{where}: count", []).append(
                (parts["count"].argmax(-1) == told["count"][:, None]).flatten()
            )
            written = told["text"].any(1)
            spelled = parts["text"].unflatten(-1, (TEXT, -1)).argmax(-1) == told["text"].unsqueeze(1)
            right.setdefault(f"{where}: text", []).append(spelled.all(-1)[written].flatten())
    joined = {name: torch.cat(hits).float() for name, hits in right.items()}
    return {name: round(100 * float(hits.mean()), 2) for name, hits in joined.items() if len(hits)}


def save_tower(pupil: Pupil, kind: str, out: Path) -> Pupil:
    """Write the tower in Hugging Face layout as float16; returns the pupil with the weights that were written."""
    kept = copy.deepcopy(pupil).eval()
    kept.tower.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    kept.tower.float()
    mean, std = MEAN_STD[kind]
    name = "SiglipImageProcessor" if kind == "siglip" else "CLIPImageProcessor"
    size: dict[str, object] = {"size": {"height": 64, "width": 64}}
    if kind == "clip":
        size = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
    settings = {
        "image_processor_type": name, "do_convert_rgb": True, "do_resize": True, **size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return kept


def main() -> None:
    """Train, save, probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(MEAN_STD), required=True)
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier, after this long; 0 for no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=150_000, help="generated scenes, rendered once at the start")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=None, help="directory to resume from and to save the state in")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes, easy = scene_pool("train", args.seed, args.pictures, args.threads), easy_vqa_pool("train")
    print(f"{len(scenes.images)} scenes and {len(easy.images)} easy-VQA pictures ready", flush=True)
    pupil, batches = Pupil(args.kind), Batches(scenes, easy, args.kind, args.seed)
    optimizer, clock = optimizer_for(pupil), Clock(args.steps, args.minutes)
    if args.state and load_state(args.state, pupil, optimizer, clock):
        print(f"resumed at step {clock.step}", flush=True)
    saved, smooth = clock.elapsed, 0.0
    while clock.progress < 1:
        pixels, owners, attributes = batches.draw(clock.step, args.batch, easy=args.batch // 6)
        set_rate(optimizer, clock.rate(args.lr))
        with torch.autocast("cpu", torch.bfloat16):
            local, summary, pooled = pupil(pixels)
        told = summary_labels(attributes)
        loss = local_loss(local, patch_labels(owners, attributes)) + 0.5 * summary_loss(summary, told)
        loss = loss + 0.25 * summary_loss(pooled.unsqueeze(1), told)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        clock.step += 1
        smooth = loss.item() if clock.step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if clock.step % 50 == 0:
            print(clock.line(smooth, args.batch, "images"), flush=True)
        if clock.elapsed - saved > SAVE_EVERY:
            saved = clock.elapsed
            save_tower(pupil, args.kind, args.out)
            if args.state:
                save_state(args.state, pupil, optimizer, clock)
    kept = save_tower(pupil, args.kind, args.out)
    trained = clock.elapsed
    report = {
        "kind": args.kind, "seed": args.seed, "steps": clock.step, "batch": args.batch, "minutes": trained / 60,
        "scenes (held out)": probe(kept, scene_pool("eval", 0, 2000, args.threads), args.kind),
        "easy-VQA test": probe(kept, easy_vqa_pool("test"), args.kind),
    }  # fmt: skip
    print(json.dumps(report, indent=1), flush=True)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
