"""A directory ready for the Hugging Face Hub: the files, and a model card that carries what was measured.

Nothing here reaches the network but `push`, which lists what it would send and asks first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmarks import report_formats as formats
from .benchmarks.model_card import model_card_section
from .benchmarks.report_tables import cell
from .benchmarks.results import Sample, read_results
from .benchmarks.summary import BuildSummary, summarise
from .bundle import MANIFEST, STAMP, WEB, Build, Bundle, WebBuild, read_bundle
from .checkpoint_spec import SPEC_FILE, load_spec
from .errors import BundleError, DataError, StorageError, UsageError
from .files import new_directory, write_text
from .spec import ModelSpec

CARD = "README.md"
GUIDE = "STOCK_HOSTS.md"  # as export/stock_hosts.py names it
_TAGS = ("tinyllava", "llava", "vision-language-model")
_NONE = "–"
_HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"  # an owner or a model; `..` would be another place
_WEIGHTS = (".safetensors", ".gguf", ".onnx")
_STOCK = "LlavaForConditionalGeneration"


def write_hf_layout(
    source: Path,
    out: Path,
    *,
    results: Sequence[Path] = (),
    base_model: str = "",
    licence: str = "apache-2.0",
    force: bool = False,
) -> Path:
    """Copy a bundle or a checkpoint, and write its model card.

    Args:
        source: a bundle directory or a checkpoint directory.
        out: directory to write, whole or not at all.
        results: results.jsonl files of this bundle; the card's table is computed from their raw samples.
        base_model: Hub id of the model that this one was made from; left out when empty.
        licence: the Hub's name of the licence.
        force: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        UsageError: neither a bundle nor a checkpoint, or an impossible licence or Hub id.
        BundleError, CheckpointError: it is damaged, or its stamp holds something else than measurements.
        DataError: results that can't be read, or of another bundle.
        StorageError: `out` exists and `force` is off, or the disk is full.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", licence):
        raise UsageError(f"licence {licence!r}", "give the Hub's short name, e.g. apache-2.0")
    if base_model and not re.fullmatch(rf"{_HUB_NAME}(/{_HUB_NAME})?", base_model):
        raise UsageError(f"base model {base_model!r} is no Hub id", "give it as owner/name")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"{out} holds the model itself", "name another place with -o")
    if (source / MANIFEST).is_file():
        bundle = read_bundle(source)
        bundle.check()
        names = [MANIFEST, *([STAMP] if (source / STAMP).is_file() else [])]
        names += [entry.path for file in bundle.files for entry in file.entries]
        if CARD in names:
            raise UsageError(
                f"{source}: lists a {CARD} of its own, where the model card goes", "export the bundle again"
            )
        samples = _samples(results, bundle)
        body = _bundle_card(bundle, samples)
        front = _front(licence, "tinyllava-edge", base_model, "quantized", ("gguf", "onnx", "llama.cpp"))
    elif (source / SPEC_FILE).is_file():
        spec = load_spec(source)
        names = sorted(path.name for path in source.iterdir() if path.is_file() and _published(path))
        body = _checkpoint_card(source, spec, results, names)
        library = "transformers" if _is_stock(source) else "tinyllava-edge"
        front = _front(licence, library, base_model, "finetune", ())
    else:
        raise UsageError(f"{source}: neither a bundle nor a checkpoint", f"it needs {MANIFEST} or {SPEC_FILE}")
    with new_directory(out, force=force, ours=CARD) as temporary:
        for name in names:
            _copy(source / name, temporary / name)
        write_text(temporary / CARD, f"{front}\n{body}")
    return out


def listing(root: Path) -> list[tuple[str, int]]:
    """Every file below a directory with its size in bytes, the largest last. Raises UsageError for a link."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            raise UsageError(f"{path}: a link", "replace it by the file itself, or remove it")
        if path.is_file():
            found.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return sorted(found, key=lambda item: (item[1], item[0]))


def push(
    root: Path,
    repo_id: str,
    *,
    confirm: Callable[[str], bool],
    private: bool = True,
    endpoint: str | None = None,
) -> str | None:
    """Upload a directory that write_hf_layout made, after asking.

    Args:
        root: the directory.
        repo_id: `owner/name` on the Hub; created if it isn't there.
        confirm: is shown every file with its size and where it would go; nothing is sent unless it returns True.
        private: visibility of a repository that is created.
        endpoint: another Hub than huggingface_hub's own default.

    Returns:
        Address of the upload's commit, or None where confirm said no.

    Raises:
        UsageError: not such a directory, or an impossible repository name.
        StorageError: the Hub can't be reached, or refused.
    """
    if not (root / CARD).is_file():
        raise UsageError(f"{root}: no {CARD}", "make the directory with write_hf_layout first")
    if not re.fullmatch(rf"{_HUB_NAME}/{_HUB_NAME}", repo_id):
        raise UsageError(f"repository {repo_id!r}", "give it as owner/name")
    files = listing(root)
    total = sum(size for _, size in files)
    lines = [f"{formats.mega(size):>10} MB  {name}" for name, size in files]
    kind = "private" if private else "PUBLIC"
    asked = f"upload {len(files)} files, {formats.mega(total)} MB, to {repo_id} ({kind} if it is new)?"
    if confirm("\n".join([*lines, asked])) is not True:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        done = api.upload_folder(
            repo_id=repo_id, folder_path=root, repo_type="model", commit_message="Upload with tinyllava-edge"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            f"{repo_id}: not uploaded ({reason[0][:200]})", "log in with `hf auth login`, then repeat"
        ) from error
    return str(done.commit_url)


def _front(licence: str, library: str, base_model: str, relation: str, tags: Sequence[str]) -> str:
    """YAML front matter; strings in JSON's form, which YAML reads."""
    rows = [f"license: {json.dumps(licence)}", f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    if base_model:
        rows += [f"base_model: {json.dumps(base_model)}", f"base_model_relation: {relation}"]
    rows += ["tags:", *(f"- {tag}" for tag in (*_TAGS, *tags))]
    return "\n".join(["---", *rows, "---", ""])


def _samples(results: Sequence[Path], bundle: Bundle) -> list[Sample]:
    """The results' lines. Raises DataError where they speak of another bundle, or of none."""
    samples = read_results(list(results))
    hashes = {sample.detail.get("sha256") for sample in samples if sample.kind == "bundle"}
    if samples and hashes != {bundle.sha256}:
        raise DataError(
            f"{', '.join(map(str, results))}: measured on another bundle than {bundle.root}",
            "measure this bundle with `tinyllava-edge bench` and `eval`",
        )
    return samples


def _bundle_card(bundle: Bundle, samples: Sequence[Sample]) -> str:
    summary = summarise(samples)
    measured, reference = {found.build: found for found in summary.builds}, summary.reference
    builds = bundle.builds()
    stamps = bundle.verified_builds()
    of_both: dict[str, Build | WebBuild] = {**builds, **bundle.web_builds()}
    rows = [_row(name, build.bytes, measured.get(name), stamps.get(name)) for name, build in of_both.items()]
    if reference is not None:
        rows.append(_row(f"reference ({reference.build})", None, reference, None))
    first = next(iter(builds.values()))
    spec = bundle.spec
    parts = [
        f"# {cell(bundle.name)}",
        _what(spec),
        "Files for devices: ONNX for the picture, GGUF for the language model. Nothing is fetched to run them.",
        "## Builds",
        "A build is a vision precision and a language-model type"
        + (f"; a name that begins with `{WEB}` is a browser's." if bundle.web_builds() else "."),
        _table(("build", "size, MB", "accuracy", "first token, ms", "peak memory, MB", "verified"), rows),
        model_card_section(summary) or "Nothing was measured.",
        "## Parity with the checkpoint",
        _parity(bundle.root / STAMP, stamps) or "No build was verified.",
        "## Use",
        f"```\ntinyllava-edge run . --build {first.name} --image cat.jpg 'What is this?'\n```",
    ]
    hosts = _stock_section(bundle)
    return "\n\n".join(part for part in [*parts, hosts] if part) + "\n"


def _checkpoint_card(root: Path, spec: ModelSpec, results: Sequence[Path], names: Sequence[str]) -> str:
    samples = read_results(list(results))
    size = sum((root / name).stat().st_size for name in names if name.endswith(_WEIGHTS))
    reference = summarise(samples).reference
    parts = [f"# {cell(spec.name)}", _what(spec), f"Weights: {formats.mega(size)} MB of safetensors."]
    if reference is not None:
        heads = ("precision", "size, MB", "accuracy", "first token, ms", "peak memory, MB", "verified")
        table = _table(heads, [_row(reference.build, size, reference, None)])
        parts += ["## Measured", table, _measured_on(results, samples)]
    model = _STOCK if _is_stock(root) else "TinyLlava"
    origin = "transformers" if _is_stock(root) else "tinyllava_edge.model"
    parts += [
        "## Use",
        "Files for a device:\n\n```\ntinyllava-edge export . -o BUNDLE\n```",
        f"In Python:\n\n```python\nfrom {origin} import {model}\n\nmodel = {model}.from_pretrained('.')\n```",
        "`model_spec.json` says how pictures and prompts must be made.",
    ]
    if not _is_stock(root):
        parts.append("Stock Llava can't represent this model, so the files carry an architecture name of their own.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(spec: ModelSpec) -> str:
    """The model in two sentences."""
    policy = {"warp": "stretched", "crop": "cropped", "pad": "padded"}[spec.image_policy]
    side = spec.image_size
    return (
        f"A TinyLLaVA: {spec.vision_family} tower, {cell(spec.connector)} connector and {cell(spec.llm_family)} "
        "language model. "
        f"A picture is {policy} to {side} x {side} pixels and becomes {spec.visual_tokens} tokens."
    )


def _row(name: str, size: int | None, summary: BuildSummary | None, stamp: Any) -> tuple[str, ...]:
    if summary is None:
        return (name, formats.mega(size), _NONE, _NONE, _NONE, _yes(stamp))
    accuracy = formats.percent(summary.accuracy)
    if summary.accuracy is not None:
        low, high = (100 * bound for bound in (summary.accuracy.low, summary.accuracy.high))
        accuracy += f" ({low:.1f}–{high:.1f}), {summary.n:,} questions"
    ttft = formats.ms(summary.ttft.estimate) if summary.ttft else _NONE
    memory = formats.mega(summary.memory.get("peak_rss"))
    return (name, formats.mega(size), accuracy, ttft, memory, _yes(stamp))


def _yes(stamp: Any) -> str:
    if stamp is None:
        return _NONE
    return "yes" if isinstance(stamp, Mapping) and stamp.get("passed") is True else "no"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured_on(results: Sequence[Path], samples: Sequence[Sample]) -> str:
    """Where the numbers come from; the 95 % intervals stand in brackets."""
    if not samples:
        return "Nothing was measured."
    found = [s.detail.get("cpu") or {} for s in samples if s.kind == "environment"]
    if not all(isinstance(cpu, Mapping) for cpu in found):
        files = ", ".join(map(str, results))
        raise DataError(f"{files}: an environment line's `cpu` is no table", "measure again with this version")
    named = ", ".join(sorted({cell(str(cpu["model"])) for cpu in found if cpu.get("model")}))
    return (
        f"Measured on {named or 'an unnamed machine'}; 95 % intervals in brackets, medians of the time to first token."
    )


def _parity(path: Path, stamps: Mapping[str, Any]) -> str:
    """What `verify` measured of each build: stages as columns. Raises BundleError that names the stamp's file."""
    rows = []
    for name, stamp in stamps.items():
        checks = stamp.get("checks") if isinstance(stamp, Mapping) else None
        if not isinstance(checks, list | None):
            raise BundleError(f"{path}: the checks of {name[:40]!r} are no list", "run `verify` again")
        for check in [check for check in checks or () if isinstance(check, Mapping) and check.get("gated")]:
            try:
                rows.append((name, str(check.get("stage")), formats.limit(check), _numbers(check)))
            except ValueError as error:
                raise BundleError(f"{path}: a check of {name[:40]!r} has {error}", "run `verify` again") from error
    return _table(("build", "stage", "allowed", "measured"), rows) if rows else ""


def _numbers(check: Mapping[str, Any]) -> str:
    """What one check measured. Raises ValueError where that is no number."""
    for key in ("max_abs", "relative", "cosine", "share"):
        if not formats.is_number(check.get(key)):
            raise ValueError(f"{key} = {str(check[key])[:80]!r}")
    shown = {
        "largest": formats.tiny(check.get("max_abs")),
        "relative": formats.tiny(check.get("relative")),
        "cosine": formats.cosine(check.get("cosine")),
        "agree, %": formats.share(check.get("share")),
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value != formats.NONE) or _NONE


def _stock_section(bundle: Bundle) -> str:
    """The text for stock llama.cpp hosts that came with an mmproj, one heading lower."""
    for file in bundle.files:
        if file.role == "text" and file.path == GUIDE:
            text = bundle.path(file).read_text(encoding="utf-8")
            return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.strip().splitlines())
    return ""


def _is_stock(root: Path) -> bool:
    """Whether stock transformers loads the checkpoint rightly: it says so itself."""
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architectures") == [_STOCK]


def _published(path: Path) -> bool:
    """Files of a checkpoint that belong on the Hub: no card of old, nothing hidden, no pickles."""
    hidden = path.name.startswith(".") or path.name == CARD
    return not hidden and path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")


def _copy(source: Path, target: Path) -> None:
    """Weights get a second name for the same bytes where the disk allows it; texts, which people edit, are copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _WEIGHTS:
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
