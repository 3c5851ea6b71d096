"""More LLM types for a bundle that exists: `tinyllava-edge quantize BUNDLE --llm iq4_xs --imatrix calib.gguf`.

A bundle is immutable, so a new one is made beside it: files that stay are hard links (copies where the disk has none),
the new GGUFs are quantised from the bundle's own float file, and the manifest is written last. By default the new
bundle then takes the old one's place, in two renames; with `out` both stay. Stamps of `verify` are carried over for
builds whose files are the same bytes, because what they say is still true; the new builds carry none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, ROLES, STAMP, WEB, Bundle, BundleFile, describe_file, read_bundle, write_manifest
from ..checkpoint import llm_source
from ..errors import StorageError, UsageError
from ..files import json_text, new_directory, sha256_tree, write_text
from ..runtimes.headers import check_gguf
from ..runtimes.memory_limit import size_words
from .bundle_writer import FIGURES, base_type
from .imatrix import Imatrix
from .llm import export_llm
from .llm_types import FLOAT_LLM_TYPES, LLM_TYPES
from .profile_record import RECORD, read_record
from .quantize import check_request, quantize_recorded
from .stock_hosts import GUIDE, MODELFILE

Progress = Callable[[str], None]
_MAX_RECORD = 200  # characters of a value in the manifest's source table


def quantize_bundle(
    root: Path,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None = None,
    overrides: Mapping[str, str] | None = None,
    out: Path | None = None,
    checkpoint: Path | None = None,
    n_threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Add LLM types to a bundle, or replace them with better ones, whole or not at all.

    Args:
        root: bundle directory.
        types: keys of LLM_TYPES; one that the bundle holds already is replaced, shards by one file.
        imatrix: importance matrix, see calibrate.collect.
        overrides: see quantize_gguf.
        out: bundle to write; None replaces `root`.
        checkpoint: where the float weights come from when the bundle holds none; the one that it was exported from.
        n_threads: threads to use; all cores by default.
        force: replace `out` if it exists.
        progress: told each step, fallbacks and what is replaced.

    Returns:
        The new bundle, opened; its manifest records the importance matrix's hash and the overrides of each type.

    Raises:
        UsageError: an unknown type, one that needs an importance matrix, an override that can't be, or no float file to
            start from.
        BundleError: the bundle can't be used, or its float file or profile.json was changed.
        ExportError: see quantize_gguf.
        StorageError: `out` exists and `force` is off, or the disk is full.
    """
    tell, target = progress or (lambda _text: None), out or root
    replaces = target.resolve() == root.resolve()
    bundle = read_bundle(root)
    if not replaces and (target.resolve() in root.resolve().parents or root.resolve() in target.resolve().parents):
        raise UsageError(f"{target} and {root} lie in one another", "name another place with -o")
    for name in types:
        check_request(name, imatrix is not None)
    record = read_record(bundle)
    names = tuple(name for name in LLM_TYPES if name in types)
    source = _float_file(bundle, checkpoint)
    base_name = source.precision if source is not None else ""
    if not names or base_name in names:
        what = f"{base_name} is what the others are made from" if names else "no LLM type asked for"
        raise UsageError(f"{root}: {what}", f"name others of {', '.join(LLM_TYPES)} with --llm")
    if target.exists() and not force and not replaces:  # said before the long work, and again by new_directory
        raise StorageError(f"{target} exists already", "name another place with -o, or replace it with --force")
    if imatrix is not None and imatrix.checkpoint_sha256 not in ("", bundle.source.get("sha256")):
        tell("note: the importance matrix was collected on another checkpoint than this bundle's")
    kept = [file for file in bundle.files if not (file.role == "llm" and file.precision in names)]
    gone = {entry.path for file in bundle.files if file not in kept for entry in file.entries}
    if gone:
        tell(f"replacing {', '.join(sorted(gone))}")
    if record is not None:  # an estimate needs the device's processor and C library, which it doesn't keep
        tell(
            f"note: {RECORD} stays as it is: builds of {', '.join(names)} aren't counted against the "
            f"{size_words(record['budget_bytes'])} that {record['name']} gives; export with --profile counts them"
        )
    with new_directory(target, force=force or replaces, ours=MANIFEST) as temporary:
        _link(bundle.root, temporary, {MANIFEST, STAMP, *gone})
        if source is None:
            base, kind = _write_float(checkpoint, temporary, tell)
        else:
            base, kind = bundle.path(source), source.precision
        made: list[BundleFile] = []
        figures: dict[str, dict[str, Any]] = {}
        for name in names:
            path = f"llm-{name}.gguf"
            counts, figures[name] = quantize_recorded(
                base,
                temporary / path,
                name,
                kind,
                imatrix=imatrix,
                overrides=overrides,
                n_threads=n_threads,
                tell=tell,
            )
            made.append(describe_file(temporary, path, "llm", name, counts))
        if source is None:
            base.unlink()
        renamed = {file.path: f"llm-{file.precision}.gguf" for file in bundle.files if file.path in gone}
        kept = [_brought_up_to_date(temporary, file, figures, renamed) for file in kept]
        files = sorted([*kept, *made], key=_order)
        tools = {**bundle.tool_versions, "quantize": f"llama-cpp-python {version('llama-cpp-python')}"}
        write_manifest(temporary, bundle.spec, files, _record(bundle, names, imatrix, overrides), tools)
        fresh = read_bundle(temporary)
        same = {name: record for name, record in bundle.verified_builds().items() if _same(bundle, fresh, name)}
        if same:
            fresh.stamp(same)
    tell(f"wrote {target}")
    return read_bundle(target)


def _float_file(bundle: Bundle, checkpoint: Path | None) -> BundleFile | None:
    """What to quantise: the bundle's best float file, its hash checked; None where it must come from the checkpoint."""
    for name in FLOAT_LLM_TYPES:
        for file in bundle.files:
            if file.role == "llm" and file.precision == name:
                bundle.check_files((file,))
                check_gguf(bundle.path(file))
                return file
    if checkpoint is None:
        raise UsageError(
            f"{bundle.root}: holds no float language model to start from",
            "give the checkpoint with --against, or export with --llm f16 too",
        )
    if sha256_tree(checkpoint) != bundle.source.get("sha256"):
        raise UsageError(f"{checkpoint} is not the checkpoint of {bundle.root}", "export that checkpoint instead")
    return None


def _write_float(checkpoint: Path | None, root: Path, tell: Progress) -> tuple[Path, str]:
    """The float file that an export starts from, and its type."""
    if checkpoint is None:
        raise UsageError("no checkpoint", "give it with --against")
    source = llm_source(checkpoint)
    kind, path = base_type(source), root / "float.gguf"
    tell(f"language model: {kind}, to start from")
    export_llm(source, path, kind)
    return path, kind


def _link(old: Path, new: Path, left_out: set[str]) -> None:
    """Every regular file of the old bundle under the new one's name, without copying where the disk allows it."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if name in left_out or path.is_symlink() or not path.is_file():
            continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, new / name)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(path, new / name)


def _brought_up_to_date(
    root: Path, file: BundleFile, figures: Mapping[str, Any], renamed: Mapping[str, str]
) -> BundleFile:
    """The texts of our making that tell of LLM files: export.json, Modelfile, guide. The old bundle's stay as they are.

    A file that was split comes back as one, under another name.
    """
    path = root / file.path
    if file.path not in (FIGURES, MODELFILE, GUIDE):
        return file
    try:
        old = text = path.read_text(encoding="utf-8")
        if file.path == FIGURES:
            value = json.loads(text)
            value["llm"] = {**value["llm"], **figures}
            text = json_text(value)
        else:
            for before, after in renamed.items():
                text = text.replace(before, after)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return file
    if text == old:
        return file
    write_text(path, text)  # a new file under the name: the link to the old one is cut
    return describe_file(root, file.path, file.role, file.precision, file.tensor_types)


def _order(file: BundleFile) -> int:
    """Language models stand together, from the highest precision to the lowest; the rest stays in its order."""
    if file.role != "llm":
        return -1 if file.role in ROLES else len(LLM_TYPES)
    return list(LLM_TYPES).index(file.precision) if file.precision in LLM_TYPES else len(LLM_TYPES)


def _record(
    bundle: Bundle, names: Sequence[str], imatrix: Imatrix | None, overrides: Mapping[str, str] | None
) -> dict[str, str]:
    """The manifest's source table with what the new types were made with."""
    mine = ("imatrix_sha256", "overrides")
    record = {
        key: value for key, value in bundle.source.items() if key not in {f"{n}.{k}" for n in names for k in mine}
    }
    for name in names:
        if imatrix is not None:
            record[f"{name}.imatrix_sha256"] = imatrix.sha256
        if overrides:
            text = " ".join(f"{pattern}={kind}" for pattern, kind in overrides.items())
            short = text if text.isprintable() and len(text) <= _MAX_RECORD else f"{len(overrides)}, in the GGUF"
            record[f"{name}.overrides"] = short
    return record


def _same(old: Bundle, new: Bundle, name: str) -> bool:
    """Whether a build is the same bytes in both."""
    if name.startswith(WEB):
        return name in new.web_builds() and old.web_builds().get(name) == new.web_builds()[name]
    before, after = old.builds().get(name), new.builds().get(name)
    return before is not None and after is not None and before == after
