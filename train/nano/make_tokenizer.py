"""Train the nano LM's byte-level BPE tokenizer: 1,024 tokens, on generated captions and questions and a little English.

python train/nano/make_tokenizer.py --out tinyllava_edge/nano/llm
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinyllava_edge.data.scene_text import COLORS, SHAPES, caption_of, turns_of
from tinyllava_edge.data.scenes import layout

VOCABULARY = 1024
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ENGLISH = Path(__file__).with_name("english.txt")
MUST_BE_ONE = [f" {word}" for word in (*COLORS, *SHAPES, "yes", "no", "small", "large", *"0123456789ABCD")]


def corpus(seed: int, scenes: int = 3000) -> Iterator[str]:
    """Training text; two-digit numbers and drawn words are left out so that they are spelled character by character."""
    rng = random.Random(seed)
    for _ in range(200):
        yield f"{SYSTEM} USER: \nDescribe the image. ASSISTANT: yes no"
        yield " ".join(f"digit {d}" for d in "0123456789") + " A B C D"
        yield from (f"{word}{word.strip()}" for word in MUST_BE_ONE)
    for _ in range(scenes):
        objects = layout(rng, tier="count")
        yield caption_of(objects)
        yield from (f"\n{t.question} ASSISTANT: {t.answer}" for t in turns_of(objects, rng))
    yield from ENGLISH.read_text(encoding="utf-8").splitlines()


def make(seed: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting; every byte has a token, and `<s>` comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (UNKNOWN, BEGIN, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}: add text to {ENGLISH.name}")
    for text in MUST_BE_ONE:
        if len(tokenizer.encode(text, add_special_tokens=False).ids) != 1:
            raise RuntimeError(f"{text!r} is not one token")
    return tokenizer


def main() -> None:
    """Train, save, and check that transformers reads back the same ids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make(args.seed)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=UNKNOWN,
        model_max_length=2048, clean_up_tokenization_spaces=False,
    ).save_pretrained(args.out)  # fmt: skip
    config = args.out / "tokenizer_config.json"  # the name that older transformers and transformers.js know too
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    sample = f"{SYSTEM} USER: \nis there not a teal shape? ASSISTANT: no</s> naïve 47 cat\n\n  ok"
    read = AutoTokenizer.from_pretrained(args.out)
    if read(sample).input_ids != tokenizer.encode(sample).ids or read.decode(read(sample).input_ids[1:]) != sample:
        raise RuntimeError("transformers and tokenizers disagree about the same files")
    print(f"{type(read).__name__}: {VOCABULARY} tokens; the system prompt takes {len(tokenizer.encode(SYSTEM).ids)}")


if __name__ == "__main__":
    main()
