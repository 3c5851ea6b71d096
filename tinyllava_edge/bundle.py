"""The directory that goes to the device: `bundle.json`, ONNX, GGUF; self-contained, every file hashed.

    bundle.json         schema below; written last
    preprocess.onnx     uint8 RGB (1, H, W, 3) → pixel_values float32 (1, 3, S, S)
    vision-fp32.onnx    pixel_values (B, 3, S, S) → image_embeds (B, T, D), image_features (B, T, V)
    vision-int8.onnx    the same graph, quantised
    llm-f16.gguf        token embedding + decoder + tokenizer; one file, or one set of shards, per LLM type
    mmproj-….gguf       tower + connector for llama.cpp's own programs; optional
    web/                transformers.js layout; optional
    mobile/             .ort, .pte, .tflite … for native hosts; optional
    Modelfile, …        texts for people and other programs; optional
    verified.json       written by `verify` for this very bundle.json; names the builds that passed

A file may have parts: the further shards of a GGUF, or the weights that an ONNX graph keeps beside itself.
A build is a vision precision × an LLM type, named `{vision}+{llm}`, e.g. `int8+q4_k_m`. What a browser runs of `web/`
is a build, too, named after its precision, e.g. `web-q4`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, CheckpointError, UnverifiedError, UsageError
from .files import has_huge_integer, safe_join, sha256_file, write_json
from .spec import ModelSpec

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
STAMP = "verified.json"
MAX_MANIFEST_BYTES = 4 << 20
ROLES = ("preprocess", "vision", "llm")  # what every bundle holds
OPTIONAL_ROLES = ("mmproj", "web", "mobile", "text")
WEB = "web-"  # in front of a web precision: the name of a browser's build
_ODD = "export it again, or update tinyllava-edge here: newer versions may write what this one doesn't know"
_WEB_GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
_WEB_GRAPH = re.compile(rf"web/onnx/({'|'.join(_WEB_GRAPHS)})(_[a-z0-9_]+)?\.onnx")  # as in the page's manifest.ts
_BELOW = {"web": "web/", "mobile": "mobile/"}  # where files of a role lie; their parts, too
_WEB_TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class BundlePart:
    """A file that belongs to another one: a GGUF's further shard, an ONNX graph's weights."""

    path: str
    """relative to the bundle, forward slashes"""
    sha256: str
    """hex digest of the file's bytes"""
    bytes: int
    """file size in bytes"""


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle."""

    path: str
    """relative to the bundle, forward slashes"""
    role: str
    """one of ROLES or OPTIONAL_ROLES"""
    precision: str
    """vision: fp32, int8 …; llm, mmproj: f16, q8_0, q4_k_m …; web: fp32, q4 …; mobile: ort_int8 …; `text` for texts"""
    sha256: str
    """hex digest of the file's bytes"""
    bytes: int
    """file size in bytes"""
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    """type → number of tensors, read back from the written file and its parts"""
    parts: tuple[BundlePart, ...] = ()
    """files that are opened together with this one, in order"""

    @property
    def entries(self) -> tuple[BundleFile | BundlePart, ...]:
        """The file and its parts."""
        return (self, *self.parts)

    @property
    def total_bytes(self) -> int:
        """Size of the file and its parts in bytes."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True)
class Build:
    """One runnable combination of a bundle's files."""

    name: str
    """`{vision}+{llm}`"""
    preprocess: BundleFile
    """the preprocessing graph"""
    vision: BundleFile
    """tower + connector"""
    llm: BundleFile
    """language model"""

    @property
    def bytes(self) -> int:
        """What this build takes on the device's disk, in bytes."""
        return sum(file.total_bytes for file in self.files)

    @property
    def files(self) -> tuple[BundleFile, ...]:
        """The files that running this build opens."""
        return (self.preprocess, self.vision, self.llm)


@dataclass(frozen=True)
class WebBuild:
    """What a browser runs: one web precision."""

    name: str
    """`web-{precision}`"""
    precision: str
    """of the graphs, in transformers.js's words"""
    preprocess: BundleFile
    """the preprocessing graph, the same for every build"""
    vision: BundleFile
    """pixel_values → image embeddings"""
    embed: BundleFile
    """input_ids → embeddings"""
    decoder: BundleFile
    """embeddings → logits"""
    texts: tuple[BundleFile, ...]
    """tokenizer.json, tokenizer_config.json, generation_config.json"""

    @property
    def bytes(self) -> int:
        """What a browser loads, in bytes."""
        return sum(file.total_bytes for file in self.files)

    @property
    def files(self) -> tuple[BundleFile, ...]:
        """The files that the page reads."""
        return (self.preprocess, self.vision, self.embed, self.decoder, *self.texts)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Opening reads the manifest; `check` reads the files."""

    root: Path
    """directory"""
    name: str
    """model name"""
    spec: ModelSpec
    """how the model must be fed"""
    files: tuple[BundleFile, ...]
    """every file but the manifest and the stamp"""
    source: Mapping[str, str]
    """`name` and `sha256` of the checkpoint that was exported"""
    tool_versions: Mapping[str, str]
    """versions of what wrote the files"""
    sha256: str
    """hex digest of bundle.json"""

    def builds(self) -> dict[str, Build]:
        """Every combination, in the manifest's order, by name."""
        by_role = {role: [f for f in self.files if f.role == role] for role in ROLES}
        preprocess = by_role["preprocess"][0]
        return {
            f"{vision.precision}+{llm.precision}": Build(f"{vision.precision}+{llm.precision}", preprocess, vision, llm)
            for llm in by_role["llm"]
            for vision in by_role["vision"]
        }

    def build(self, name: str | None = None) -> Build:
        """A build by name; the first one (highest precision) by default. Raises UsageError that lists the names."""
        builds = self.builds()
        if name is None:
            return next(iter(builds.values()))
        if name not in builds:
            raise UsageError(f"{self.root}: no build {name!r}", f"it holds: {', '.join(builds)}")
        return builds[name]

    def web_builds(self) -> dict[str, WebBuild]:
        """What browsers can run, in the manifest's order, by name: every precision whose files are all there."""
        web = [file for file in self.files if file.role == "web"]
        preprocess = next(file for file in self.files if file.role == "preprocess")
        texts = tuple(file for name in _WEB_TEXTS for file in web if file.path == f"web/{name}")
        found = {}
        for precision in dict.fromkeys(file.precision for file in web):
            of = [file for file in web if file.precision == precision]
            vision, embed, decoder = (
                next((file for file in of if _web_graph(file) == stem), None) for stem in _WEB_GRAPHS
            )
            if vision and embed and decoder and len(texts) == len(_WEB_TEXTS):
                name = WEB + precision
                found[name] = WebBuild(name, precision, preprocess, vision, embed, decoder, texts)
        return found

    def any_build(self, name: str) -> Build | WebBuild:
        """A build or a browser's build by name. Raises UsageError that lists the names of both."""
        builds: dict[str, Build | WebBuild] = {**self.builds(), **self.web_builds()}
        if name not in builds:
            raise UsageError(f"{self.root}: no build {name!r}", f"it holds: {', '.join(builds)}")
        return builds[name]

    def path(self, file: BundleFile | BundlePart) -> Path:
        """Absolute place of a file, certain to lie inside the bundle; of a GGUF in shards, the first."""
        return safe_join(self.root, file.path)

    def paths(self, file: BundleFile) -> tuple[Path, ...]:
        """Absolute places of a file and its parts, in order."""
        return tuple(self.path(entry) for entry in file.entries)

    def check(self, build: Build | WebBuild | None = None) -> None:
        """Compare sizes and hashes of a build's files, or of all files, parts included.

        Raises:
            BundleError: at the first bad one.
        """
        self.check_files(self.files if build is None else build.files)

    def check_files(self, files: Sequence[BundleFile]) -> None:
        """Compare sizes and hashes of some files, parts included. Raises BundleError at the first bad one."""
        for entry in [entry for file in files for entry in file.entries]:
            path = self.path(entry)
            if not path.is_file():
                raise BundleError(f"{path}: missing", "copy the whole bundle again, or export it again")
            size = path.stat().st_size
            if size != entry.bytes:
                raise BundleError(
                    f"{path}: {size:,} bytes, {entry.bytes:,} expected",
                    "copy the file again; it is truncated or changed",
                )
            if sha256_file(path) != entry.sha256:
                raise BundleError(
                    f"{path}: its SHA-256 differs from bundle.json", "copy the file again; its content was changed"
                )

    def verified_builds(self) -> dict[str, Any]:
        """What verified.json says of this very manifest: build name → its record; empty where there is none.

        Raises:
            BundleError: it can't be read, or holds what a results file can't: half a character, or no finite number.
        """
        path = self.root / STAMP
        if not path.is_file():
            return {}
        stamp = _read_json(path)
        _check_plain_json(path, stamp)
        if not isinstance(stamp, dict) or stamp.get("bundle_sha256") != self.sha256:
            return {}
        builds = stamp.get("builds")
        return dict(builds) if isinstance(builds, dict) else {}

    def is_verified(self, build: Build | WebBuild) -> bool:
        """Whether `verify` passed this build of this manifest."""
        record = self.verified_builds().get(build.name)
        return isinstance(record, dict) and record.get("passed") is True

    def require_verified(self, build: Build | WebBuild, allow_unverified: bool = False) -> None:
        """Raise UnverifiedError unless the build is stamped or the caller allows it."""
        if not allow_unverified and not self.is_verified(build):
            raise UnverifiedError(
                f"{self.root}: build {build.name} carries no `verified` stamp",
                "run `tinyllava-edge verify BUNDLE --against CKPT`, or pass --allow-unverified (it is recorded)",
            )

    def stamp(self, records: Mapping[str, Any]) -> None:
        """Write verified.json for this manifest: build name → record with a boolean `passed`."""
        write_json(self.root / STAMP, {"bundle_sha256": self.sha256, "builds": dict(records)})


def read_bundle(root: str | Path) -> Bundle:
    """Read and check a bundle's manifest; files are opened by who needs them.

    Raises:
        BundleError: missing, not JSON, another schema, an entry that leaves the directory or its role's place, or two
            files of one place.
    """
    root = Path(root)
    path = root / MANIFEST
    if not path.is_file():
        raise BundleError(f"{root}: no {MANIFEST} here", "name a directory that `tinyllava-edge export` wrote")
    value = _read_json(path)
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        version = value.get("schema_version") if isinstance(value, dict) else None
        raise BundleError(
            f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}", "export the bundle again"
        )
    try:
        spec = ModelSpec.from_dict(value.get("model"), str(path))
    except CheckpointError as error:
        raise BundleError(error.message, error.hint) from error
    entries = value.get("files")
    if not isinstance(entries, list):
        raise BundleError(f"{path}: `files` is not a list", "export the bundle again")
    files = tuple(_file(path, root, entry) for entry in entries)
    paths = [entry.path for file in files for entry in file.entries]
    if len(set(paths)) != len(paths):
        raise BundleError(f"{path}: lists a file twice", "export the bundle again")
    _check_once(path, files)
    for role in ROLES:
        if not any(f.role == role for f in files):
            raise BundleError(f"{path}: lists no {role} file", "export the bundle again")
    return Bundle(
        root=root,
        name=_string(path, value, "name"),
        spec=spec,
        files=files,
        source=_strings(path, value, "source"),
        tool_versions=_strings(path, value, "tool_versions"),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def describe_file(
    root: Path, path: str, role: str, precision: str, tensor_types: Mapping[str, int], parts: Sequence[str] = ()
) -> BundleFile:
    """Manifest entry of a file that was just written below `root`, and of the parts that belong to it."""
    described = tuple(BundlePart(part, *_measure(root, part)) for part in parts)
    return BundleFile(path, role, precision, *_measure(root, path), dict(tensor_types), described)


def _measure(root: Path, path: str) -> tuple[str, int]:
    full = safe_join(root, path)
    return sha256_file(full), full.stat().st_size


def write_manifest(
    root: Path, spec: ModelSpec, files: list[BundleFile], source: Mapping[str, str], tool_versions: Mapping[str, str]
) -> None:
    """Write bundle.json. The caller fills `root` inside `files.new_directory`, so a bundle is whole or absent."""
    write_json(
        root / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "name": spec.name,
            "model": spec.to_dict(),
            "files": [{key: value for key, value in asdict(file).items() if key != "parts" or value} for file in files],
            "source": dict(source),
            "tool_versions": dict(tool_versions),
        },
    )


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {size:,} bytes, limit {MAX_MANIFEST_BYTES:,}", "this is not a bundle that we wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not valid JSON ({error})", "copy the file again, or export the bundle again"
        ) from error


def _check_plain_json(path: Path, value: Any) -> None:
    """Raise BundleError unless every text is whole and every number finite and within 64 bits."""
    hint = "remove it, then run `verify` again"
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: a value that can't be kept ({error})", hint) from error
    if has_huge_integer(value, text):
        raise BundleError(f"{path}: a whole number beyond 64 bits", hint)


def _string(path: Path, value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str) or not _plain(value[key]):
        raise BundleError(f"{path}: {key!r} is not a string", "export the bundle again")
    return str(value[key])


def _plain(text: str) -> bool:
    """Printable (so no half of a surrogate pair, no line break) and of a length that fits in an error line."""
    return text.isprintable() and len(text) <= 255


def _strings(path: Path, value: Mapping[str, Any], key: str) -> dict[str, str]:
    entry = value.get(key)
    if not isinstance(entry, dict) or not all(isinstance(v, str) and _plain(k + v) for k, v in entry.items()):
        raise BundleError(f"{path}: {key!r} is not a table of strings", "export the bundle again")
    return dict(entry)


_PART_KEYS = {"path": str, "sha256": str, "bytes": int}
_FILE_KEYS = {**_PART_KEYS, "role": str, "precision": str, "tensor_types": dict}


def _file(path: Path, root: Path, entry: Any) -> BundleFile:
    parts = entry.get("parts", []) if isinstance(entry, dict) else []
    if not isinstance(parts, list):
        raise BundleError(f"{path}: a file's 'parts' is not a list", "export the bundle again")
    plain = {key: value for key, value in entry.items() if key != "parts"} if isinstance(entry, dict) else entry
    _check_entry(path, root, plain, _FILE_KEYS)
    if plain["role"] not in ROLES + OPTIONAL_ROLES or not re.fullmatch(r"[a-z0-9_]{1,32}", plain["precision"]):
        raise BundleError(f"{path}: a file has an odd role or precision: {plain['role'][:40]!r}", _ODD)
    for part in parts:
        _check_entry(path, root, part, _PART_KEYS)
    file = BundleFile(**plain, parts=tuple(BundlePart(**part) for part in parts))
    below = _BELOW.get(file.role, "")
    for one in file.entries:
        if one.path in (MANIFEST, STAMP) or not one.path.startswith(below):
            place = f"outside {below}" if below else "in the place of one of ours"
            raise BundleError(f"{path}: a {file.role} file lies {place}: {one.path[:80]!r}", "export the bundle again")
    return file


def _web_graph(file: BundleFile) -> str:
    """Which of the page's graphs a file is; empty for others."""
    found = _WEB_GRAPH.fullmatch(file.path) if file.role == "web" else None
    return found[1] if found else ""


def _check_once(path: Path, files: Sequence[BundleFile]) -> None:
    """Raise BundleError for two files of one part and precision: which of them is run would be chance."""
    seen = set()
    for file in files:
        part = file.role if file.role in ROLES else _web_graph(file)
        if (part, file.precision) in seen:
            raise BundleError(f"{path}: lists two files for {part} of precision {file.precision}", "export it again")
        if part:
            seen.add((part, file.precision))


def _check_entry(path: Path, root: Path, entry: Any, wanted: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or set(entry) != set(wanted):
        raise BundleError(f"{path}: a file entry has the wrong keys: {str(entry)[:200]!r}", "export the bundle again")
    for key, kind in wanted.items():
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise BundleError(f"{path}: a file's {key!r} has the wrong type", "export the bundle again")
    if not _plain(entry["path"]) or not 0 <= entry["bytes"] < 1 << 63:
        raise BundleError(f"{path}: a file has an odd path or size", "export the bundle again")
    safe_join(root, entry["path"])
    if PurePosixPath(entry["path"]).as_posix() != entry["path"]:  # a//b and ./a/b would be a/b a second time
        raise BundleError(f"{path}: a file has an odd path: {entry['path'][:80]!r}", "export the bundle again")
