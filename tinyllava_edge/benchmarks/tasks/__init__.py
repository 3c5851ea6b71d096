"""The benchmarks by name. Each lives in a module of its own, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tinyllava_edge.errors import UsageError

if TYPE_CHECKING:
    from tinyllava_edge.benchmarks.tasks.base import Task

# name → module and constant
TASKS: dict[str, tuple[str, str]] = {
    "vqav2_val": ("vqav2", "TASK"),
    "vqav2_val_always_normalised": ("vqav2", "ALWAYS_NORMALISED"),
    "vqav2_test": ("vqav2", "TESTDEV"),
    "gqa": ("gqa", "TASK"),
    "scienceqa_img": ("scienceqa", "TASK"),
    "scienceqa_img_lenient": ("scienceqa", "LENIENT"),
    "textvqa_val": ("textvqa", "TASK"),
    "textvqa_val_ocr": ("textvqa", "OCR"),
    "pope": ("pope", "TASK"),
    "pope_head": ("pope", "HEAD"),
    "mme": ("mme", "TASK"),
    "mmbench_en_dev": ("mmbench", "TASK"),
    "mmvet": ("mmvet", "TASK"),
    "llava_in_the_wild": ("llava_wild", "TASK"),
    "mmmu_val": ("mmmu", "TASK"),
    "easy_vqa": ("easy_vqa", "TASK"),
}
# what people type → name
ALIASES = {
    "vqav2": "vqav2_val",
    "vqav2_testdev": "vqav2_test",
    "scienceqa": "scienceqa_img",
    "sqa": "scienceqa_img",
    "textvqa": "textvqa_val",
    "textvqa_ocr": "textvqa_val_ocr",
    "mmbench": "mmbench_en_dev",
    "mm-vet": "mmvet",
    "llava_w": "llava_in_the_wild",
    "llava-bench-in-the-wild": "llava_in_the_wild",
    "mmmu": "mmmu_val",
    "easy-vqa": "easy_vqa",
}


def find(name: str) -> Task:
    """Look a task up by its exact name or alias; the empty name is exact match on LLaVA JSON.

    Raises:
        UsageError: lists the known names.
    """
    if not name:
        from tinyllava_edge.benchmarks.tasks.llava_json import EXACT

        return EXACT
    key = ALIASES.get(name, name)
    if key not in TASKS:
        raise UsageError(f"unknown task {name!r}", f"known: {', '.join(TASKS)}; or name a LLaVA JSON file")
    module, constant = TASKS[key]
    task: Task = getattr(import_module(f"{__name__}.{module}"), constant)
    return task
