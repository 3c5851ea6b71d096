"""How far a build may be from its checkpoint, per stage and precision, and why.

`relative` is ‖difference‖ / ‖reference‖ of one sample, the worst sample counting; `cosine` is the lowest over all rows
(one row per visual token, or the logits of a sample). Relative error sees a wrong scale, cosine sees one bad token.
Logits are centred first: adding a constant to all of them changes nothing.

Floating-point limits are an order of magnitude above what correct exports measure, and one to three below what the
known faults do (a swapped mean, a wrong feature layer, a post-norm left in). Quantised limits are about three times
what a trained nano model measures on 66 pictures (relative error of the logits: q8_0 0.023, q6_k 0.069, q5_k_m 0.067,
q4_k_m 0.081, q4_0 0.066), ten times for int8 vision: towers with outlier channels lose more. So other models fit
and a wrong block does not; whether the answers are still right is for `eval` to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllava_edge.errors import VerifyError


@dataclass(frozen=True)
class Tolerance:
    """Limits of one stage; a limit that is None is not applied."""

    max_abs: float | None = None
    """largest absolute difference of any value"""
    relative: float | None = None
    """largest relative error of any sample"""
    cosine: float | None = None
    """lowest cosine of any row"""
    share: float | None = None
    """pixels: smallest share of values within one grey level; ids and answers: smallest share of equal samples;
    logits: smallest share of samples with the same most likely token, ties included (see Difference.add_logits)"""
    reason: str = ""
    """why these limits"""


PIXELS = Tolerance(
    max_abs=2.0,  # grey levels
    share=0.999,
    reason="resizing rounds to 8 bits in both; a value may fall on the other side of .5, which is one grey level",
)
PROMPT_IDS = Tolerance(share=1.0, reason="tokenisation is exact or wrong")

FEATURES: dict[str, Tolerance] = {
    "fp32": Tolerance(relative=1e-3, cosine=0.99999, reason="float32 on both sides; only the order of sums differs"),
    "fp16": Tolerance(
        relative=1e-2, cosine=0.9995, reason="10-bit mantissa, about 5e-4 a value, adding up over layers"
    ),
    "int8": Tolerance(
        relative=0.2, cosine=0.98, reason="dynamic 8-bit weights and activations; 0.021 and 0.9993 measured"
    ),
    "int4": Tolerance(relative=0.4, cosine=0.92, reason="4-bit weights in blocks, float activations"),
}
EMBEDS: dict[str, Tolerance] = FEATURES  # the connector is two more matrix products of the same precision

LOGITS: dict[str, Tolerance] = {
    "f32": Tolerance(max_abs=0.02, share=1.0, reason="float32 weights, but llama.cpp keeps keys and values in float16"),
    "f16": Tolerance(max_abs=0.05, share=1.0, reason="float16 weights and key-value cache"),
    "bf16": Tolerance(relative=0.05, cosine=0.998, share=0.95, reason="7-bit mantissa"),
    "q8_0": Tolerance(relative=0.08, cosine=0.995, share=0.95, reason="8-bit blocks of 32 with a float16 scale"),
    "q6_k": Tolerance(relative=0.2, cosine=0.98, share=0.95, reason="6-bit blocks"),
    "q5_k_m": Tolerance(relative=0.2, cosine=0.98, share=0.9, reason="5-bit blocks, 6 bits where it matters"),
    "q5_k_s": Tolerance(relative=0.2, cosine=0.98, share=0.9, reason="5-bit blocks"),
    "q5_0": Tolerance(relative=0.2, cosine=0.98, share=0.9, reason="5-bit blocks"),
    "q4_k_m": Tolerance(relative=0.25, cosine=0.96, share=0.9, reason="4-bit blocks, 6 bits where it matters"),
    "q4_k_s": Tolerance(relative=0.25, cosine=0.96, share=0.9, reason="4-bit blocks"),
    "q4_0": Tolerance(relative=0.25, cosine=0.96, share=0.9, reason="4-bit blocks"),
    "iq4_xs": Tolerance(relative=0.25, cosine=0.96, share=0.9, reason="4-bit blocks with a fixed code book"),
    "iq4_nl": Tolerance(relative=0.25, cosine=0.96, share=0.9, reason="4-bit blocks with a fixed code book"),
    "q3_k_m": Tolerance(relative=0.4, cosine=0.9, share=0.8, reason="3-bit blocks"),
    "q2_k": Tolerance(relative=0.8, cosine=0.6, share=0.5, reason="2-bit blocks: rarely of use on small models"),
}
EXACT_VISION, EXACT_LLM = ("fp32",), ("f32", "f16")  # builds whose answers must equal the checkpoint's, ties aside


def whole_road(vision: str, llm: str) -> Tolerance:
    """Logits from the picture on: the LLM's own limits when the vision graph is exact, else both errors together."""
    ours, theirs = known(FEATURES, vision, "vision"), known(LOGITS, llm, "LLM")
    if vision in EXACT_VISION:
        return theirs
    relative = (ours.relative or 0.0) + (theirs.relative or 0.05)
    share = min(theirs.share or 0.0, 0.9)
    return Tolerance(relative=relative, cosine=1 - relative, share=share, reason="vision and LLM error together")


def answers(vision: str, llm: str) -> Tolerance:
    """Greedy answers: all equal, ties aside, when nothing was quantised; else a share that depends on the LLM's type.

    A changed answer is not a wrong one, and long answers change more often: `eval` counts what was lost.
    """
    if vision in EXACT_VISION and llm in EXACT_LLM:
        return Tolerance(share=1.0, reason="nothing was quantised")
    share = 0.8 * (whole_road(vision, llm).share or 0.0)
    return Tolerance(share=share, reason="four fifths of what must agree on the first token")


def known(table: dict[str, Tolerance], precision: str, what: str) -> Tolerance:
    """A precision's limits. Raises VerifyError that lists the known ones."""
    if precision not in table:
        raise VerifyError(f"no tolerance is stated for {what} precision {precision!r}", f"known: {', '.join(table)}")
    return table[precision]
