"""How far a build may be from its checkpoint, per stage and precision, and why.

`relative` is ‖difference‖ / ‖reference‖ of one sample, the worst sample counting; `cosine` is the lowest over all rows
(one row per visual token, or the logits of a sample). Relative error sees a wrong scale, cosine sees one bad token.
Logits are centred first: adding a constant to all of them changes nothing.

Float32 features are held to what float32 itself can promise, see `float32_features`: the subtlest known fault, erf-GELU
for tanh-GELU, moves them by 1e-4 to 6e-4 and nothing else shows it. Other floating-point limits are an order of
magnitude above what correct exports measure. Quantised limits are about three to four times what a trained nano model
measures on 66 pictures, ten times for int8 vision: towers with outlier channels lose more. So other models fit and a
wrong matrix does not, but one bad block may hide below 4 bits: the float builds of the same bundle show it. Types that
need an importance matrix were measured with one of ones. Whether the answers are still right is for `eval` to say.
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
SPEC = Tolerance(share=1.0, reason="two fields are equal or they are not")
PROMPT_IDS = Tolerance(share=1.0, reason="tokenisation is exact or wrong")

FEATURES: dict[str, Tolerance] = {
    "fp32": Tolerance(relative=2e-5, cosine=0.99999, reason="float32 on both sides; see float32_features"),
    "fp16": Tolerance(
        relative=1e-2,
        cosine=0.9995,
        reason="10-bit mantissa, adding up over layers; 0.0005 measured on a trained nano model",
    ),
    "int8": Tolerance(
        relative=0.2,
        cosine=0.98,
        reason="dynamic 8-bit weights and activations; 0.021 and 0.9993 measured on a trained nano model",
    ),
    "w8": Tolerance(
        relative=0.06,
        cosine=0.998,
        reason="8-bit weights in blocks, float activations; 0.013 and 0.9997 measured on a trained nano model",
    ),
    "w4": Tolerance(
        relative=0.4, cosine=0.92, reason="4-bit weights in blocks; 0.14 and 0.98 measured on a trained nano model"
    ),
    "qdq": Tolerance(
        relative=0.4,
        cosine=0.92,
        reason="static 8-bit ranges from a few pictures; 0.089 and 0.989 measured on a trained nano model",
    ),
}
EMBEDS: dict[str, Tolerance] = FEATURES  # the connector is two more matrix products of the same precision


def _blocks(relative: float, cosine: float, share: float, measured: float, what: str) -> Tolerance:
    return Tolerance(
        relative=relative, cosine=cosine, share=share, reason=f"{what}; {measured:g} measured on a trained nano model"
    )


_THREE, _TWO, _ONE = "3-bit blocks", "2-bit blocks: rarely of use on small models", "below 2 bits: for the curious"
_ROUNDED = "activations rounded to 8 bits in a way that depends on the processor"
LOGITS: dict[str, Tolerance] = {
    "f32": Tolerance(max_abs=0.02, share=1.0, reason="float32 on both sides; 0.0001 measured"),
    "f16": Tolerance(max_abs=0.05, share=1.0, reason="float16 weights and key-value cache; 0.008 measured"),
    "bf16": _blocks(0.05, 0.998, 0.95, 0.007, "7-bit mantissa"),
    "q8_0": _blocks(0.08, 0.995, 0.95, 0.015, "8-bit blocks of 32 with a float16 scale"),
    "q6_k": _blocks(0.2, 0.98, 0.95, 0.042, "6-bit blocks"),
    "q5_k_m": _blocks(0.2, 0.98, 0.9, 0.039, "5-bit blocks, 6 bits where it matters"),
    "q5_k_s": _blocks(0.2, 0.98, 0.9, 0.039, "5-bit blocks"),
    "q5_1": _blocks(0.2, 0.98, 0.9, 0.045, "5-bit blocks with an offset"),
    "q5_0": _blocks(0.2, 0.98, 0.9, 0.056, "5-bit blocks"),
    "q4_k_m": _blocks(0.25, 0.96, 0.9, 0.06, "4-bit blocks, 6 bits where it matters"),
    "q4_k_s": _blocks(0.25, 0.96, 0.9, 0.061, "4-bit blocks"),
    "q4_1": _blocks(0.3, 0.95, 0.9, 0.11, "4-bit blocks with an offset"),
    "q4_0": _blocks(0.4, 0.93, 0.9, 0.15, "4-bit blocks"),
    "iq4_nl": _blocks(0.35, 0.94, 0.9, 0.12, "4-bit blocks with a fixed code book"),
    "iq4_xs": _blocks(0.35, 0.94, 0.9, 0.12, "4-bit blocks with a fixed code book"),
    "q3_k_l": _blocks(0.45, 0.88, 0.8, 0.15, _THREE),
    "q3_k_m": _blocks(0.45, 0.88, 0.8, 0.14, _THREE),
    "q3_k_s": _blocks(0.5, 0.85, 0.8, 0.16, _THREE),
    "iq3_m": _blocks(0.45, 0.88, 0.8, 0.11, _THREE),
    "iq3_s": _blocks(0.45, 0.88, 0.8, 0.083, _THREE),
    "iq3_xs": _blocks(0.45, 0.88, 0.8, 0.099, _THREE),
    "iq3_xxs": _blocks(0.5, 0.85, 0.8, 0.12, _THREE),
    "q2_k": _blocks(0.8, 0.6, 0.5, 0.23, _TWO),
    "q2_k_s": _blocks(0.8, 0.6, 0.5, 0.35, _TWO),
    "iq2_m": _blocks(0.8, 0.6, 0.5, 0.14, _TWO),
    "iq2_s": _blocks(0.8, 0.6, 0.5, 0.14, _TWO),
    "iq2_xs": _blocks(0.8, 0.6, 0.5, 0.32, _TWO),
    "iq2_xxs": _blocks(0.8, 0.6, 0.5, 0.34, _TWO),
    "iq1_m": _blocks(0.9, 0.5, 0.5, 0.38, _ONE),
    "iq1_s": _blocks(0.9, 0.5, 0.5, 0.55, _ONE),
    "tq1_0": _blocks(0.8, 0.6, 0.5, 1.1, "for models trained with ternary weights; others fail, rightly"),
    "tq2_0": _blocks(0.8, 0.6, 0.5, 1.1, "for models trained with ternary weights; others fail, rightly"),
    # What browsers run; measured in ONNX Runtime on an x86-64 processor.
    "web-fp32": Tolerance(max_abs=0.02, share=1.0, reason="float32 on both sides; 0.00001 measured"),
    "web-fp16": _blocks(0.03, 0.999, 0.95, 0.0011, "10-bit mantissa, activations and cache too"),
    "web-q8": _blocks(0.05, 0.998, 0.95, 0.014, f"8-bit blocks; {_ROUNDED}"),
    "web-q4": _blocks(0.15, 0.98, 0.9, 0.046, f"4-bit blocks and table, 8 bits where it matters; {_ROUNDED}"),
    "web-q4f16": _blocks(0.15, 0.98, 0.9, 0.046, f"as web-q4, with a 10-bit mantissa; {_ROUNDED}"),
}
# Builds whose answers must equal the checkpoint's, ties aside.
EXACT_VISION, EXACT_LLM = ("fp32",), ("f32", "f16", "web-fp32")


def float32_features(noise: float) -> Tolerance:
    """Limits of a float32 graph, given how much rounding moves the reference itself.

    `noise` is the relative change of the reference's features when every pixel moves by its last bit: all roundings are
    drawn anew. Correct exports measured 1 to 2 times that (nano towers, trained and random; the so400m and CLIP-L
    architectures with random weights; the same with outlier channels, where it is 1e-5 instead of 5e-7); erf-GELU for
    tanh-GELU measured 20 to 500 times.
    """
    base = FEATURES["fp32"]
    relative = min(1e-3, max(base.relative or 0.0, 8 * noise))
    return Tolerance(
        relative=relative,
        cosine=base.cosine,
        reason=f"float32 on both sides: eight times the reference's own rounding ({noise:.1e}), but at least 2e-5",
    )


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
