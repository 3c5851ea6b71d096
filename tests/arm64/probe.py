"""Runs on both sides: what every stage of some builds gives for one picture and question, as one npz file.

    python probe.py BUNDLE PICTURE OUT.npz BUILD...

Keys are `BUILD/pixels`, `BUILD/embeds`, `BUILD/logits`, `BUILD/tokens` and `BUILD/repacked`.
"""

from __future__ import annotations

import platform
import sys

import numpy as np

from tinyllava_edge.runtimes.edge import open_edge


def main(bundle: str, picture: str, out: str, builds: list[str]) -> None:
    found = {"machine": np.array(platform.machine())}
    for build in builds:
        with open_edge(bundle, build, n_threads=1, allow_unverified=True) as edge:
            probe = edge.probe(picture, "is there a small blue circle in the image?", max_tokens=8)
            found[f"{build}/repacked"] = np.array(edge.environment()["llama_cpp_repack"])
        found[f"{build}/pixels"] = probe.pixel_values
        found[f"{build}/embeds"] = probe.image_embeds
        found[f"{build}/logits"] = probe.first_logits
        found[f"{build}/tokens"] = np.array(probe.answer.token_ids)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
