"""Trains cases in a row, as one process of several: `torchrun engines_child.py CASES.json RESULTS.json`.

A case: stage, engine, offload, start, data, images, out, cache, and `stop`: a process and the number of its batch in
which it gets a SIGTERM. `pids`: a directory for the number of each process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.train.dataset import StageData
from tinyllava_edge.train.engines import choose
from tinyllava_edge.train.recipes import recipe_from
from tinyllava_edge.train.trainer import train

REAL = StageData.batch
RANK = int(os.environ.get("RANK", "0"))


def run(case: dict[str, Any]) -> dict[str, Any]:
    calls = 0

    def batch(self: StageData, packs: Any) -> Any:
        nonlocal calls
        calls += 1
        if case.get("stop") == [RANK, calls]:
            os.kill(os.getpid(), signal.SIGTERM)
        return REAL(self, packs)

    if "pids" in case:
        (Path(case["pids"]) / f"{RANK}.pid").write_text(str(os.getpid()))
    StageData.batch = batch  # type: ignore[method-assign]
    (recipe,) = recipe_from({"name": "x", "stages": [case["stage"]]}, "test").stages
    paths = [Path(case[name]) for name in ("data", "images", "out")]
    began = time.monotonic()
    try:
        engine = choose(case["engine"], offload=case.get("offload", False))
        result = train(
            Path(case["start"]), recipe, *paths, progress=False, engine=engine, cache_bytes=case.get("cache", 1 << 30)
        )
    except TinyLlavaEdgeError as error:
        return {"error": error.message, "hint": error.hint, "exit": error.exit_code}
    seconds = time.monotonic() - began
    return {"losses": result.losses, "resumed_from": result.resumed_from, "steps": result.steps, "seconds": seconds}


if __name__ == "__main__":
    results = Path(sys.argv[2])
    done = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        done.append(run(case))
        results.with_name(f"{results.stem}.{RANK}.json").write_text(json.dumps(done))
