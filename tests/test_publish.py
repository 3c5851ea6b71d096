"""Model cards and uploads: what a directory for the Hub holds, and that nothing is sent unasked."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinyllava_edge.benchmarks.results import Sample, write_results
from tinyllava_edge.bundle import describe_file, read_bundle, write_manifest
from tinyllava_edge.errors import BundleError, DataError, StorageError, UsageError
from tinyllava_edge.publish import listing, push, write_hf_layout

from .benchmarks.conftest import make_samples

REPO = "someone/tiny"


def front_matter(card: str) -> Any:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


@pytest.fixture
def results(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Results of this very bundle, for the builds that it holds."""
    opened = read_bundle(tiny_bundle)
    kept = [
        replace(s, detail={**s.detail, "sha256": opened.sha256}) if s.kind == "bundle" else s
        for s in make_samples()
        if s.runtime != "edge" or s.build in opened.builds()
    ]
    path = tmp_path / "results.jsonl"
    write_results(path, kept)
    return path


def test_bundle(tiny_bundle: Path, results: Path, tmp_path: Path) -> None:
    """Every file is there and opens as a bundle; the card carries front matter, the table and the parity."""
    out = write_hf_layout(tiny_bundle, tmp_path / "hub", results=[results], base_model="org/base", licence="mit")
    again = read_bundle(out)
    again.check()
    assert again.sha256 == read_bundle(tiny_bundle).sha256
    assert again.verified_builds() != {}
    card = (out / "README.md").read_text()
    front = front_matter(card)
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["library_name"] == "tinyllava-edge"
    assert front["base_model"] == "org/base"
    assert {"tinyllava", "gguf", "onnx"} <= set(front["tags"])
    row = next(line for line in card.splitlines() if line.startswith("| fp32+f16 |"))
    size = sum(f.total_bytes for f in read_bundle(tiny_bundle).build("fp32+f16").files) / 1e6
    assert f"| {size:.1f} |" in row
    assert "600 questions" in row
    assert "96.0 % (" in row
    assert "| 144 |" in row  # 120 + 2 * 12 MB
    assert row.endswith("| yes |")
    assert "| reference (fp32) |" in card
    assert "Example CPU" in card
    assert "tinyllava-edge run . --build" in card


def test_parity_is_what_verify_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    """Limits and numbers of the gated stages."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    check = {
        "stage": "image_embeds",
        "gated": True,
        "cosine": 0.99991,
        "relative": 0.013,
        "tolerance": {"cosine": 0.98},
    }
    free = {**check, "stage": "first_logits", "gated": False}
    read_bundle(root).stamp({"fp32+f16": {"passed": True, "checks": [check, free]}})
    card = (write_hf_layout(root, tmp_path / "hub") / "README.md").read_text()
    assert "| fp32+f16 | image_embeds | cosine ≥ 0.98 | relative 0.013, cosine 0.999910 |" in card
    assert "first_logits" not in card
    assert "Nothing was measured." in card
    assert any(line.startswith("| int8+q4_k_m |") and line.endswith("| – |") for line in card.splitlines())


def test_text_for_stock_hosts_is_in_the_card(tiny_bundle: Path, tmp_path: Path) -> None:
    """The bundle's own guide stays as it is and is a part of the card too; a README.md would collide with it."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    opened = read_bundle(root)
    for name in ("STOCK_HOSTS.md", "README.md"):
        (root / name).write_text("# In llama.cpp\n\nllama-server -m x\n\n## Ollama\n")
    files = [*opened.files, describe_file(root, "STOCK_HOSTS.md", "text", "text", {})]
    more = [*files, describe_file(root, "README.md", "text", "text", {})]
    write_manifest(root, opened.spec, more, opened.source, opened.tool_versions)
    with pytest.raises(UsageError, match="model card"):
        write_hf_layout(root, tmp_path / "hub")
    write_manifest(root, opened.spec, files, opened.source, opened.tool_versions)
    out = write_hf_layout(root, tmp_path / "hub")
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "\n## In llama.cpp\n\nllama-server -m x\n\n### Ollama\n" in card
    read_bundle(out).check()


def test_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What transformers loads, nothing hidden and no pickles; texts are copies, so that editing them harms nothing."""
    from transformers import LlavaForConditionalGeneration

    root = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, root)
    for extra in (".secret", "training_args.bin", "optimizer.pt", "README.md"):
        (root / extra).write_text("x")
    out = write_hf_layout(root, tmp_path / "hub")
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()} | {"README.md"}
    card = (out / "README.md").read_text()
    assert front_matter(card)["library_name"] == "transformers"
    assert "from transformers import LlavaForConditionalGeneration" in card
    _, info = LlavaForConditionalGeneration.from_pretrained(out, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    (out / "config.json").write_text("{}")
    assert (root / "config.json").read_text() != "{}"


def test_refusals(tiny_bundle: Path, tiny_checkpoint: Path, results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        write_hf_layout(tmp_path, tmp_path / "hub" / "x")
    with pytest.raises(UsageError, match="licence"):
        write_hf_layout(tiny_bundle, tmp_path / "hub", licence="mit\nx: y")
    with pytest.raises(UsageError, match="Hub id"):
        write_hf_layout(tiny_bundle, tmp_path / "hub", base_model="a/b/c")
    for name in ("../..", "..", ".a/b", "a/.b", "-a/b", "a/-b", "ä/b"):
        with pytest.raises(UsageError, match="Hub id"):
            write_hf_layout(tiny_bundle, tmp_path / "hub", base_model=name)
    with pytest.raises(UsageError, match="holds the model"):
        write_hf_layout(tiny_bundle, tiny_bundle.parent, force=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="exists"):
        write_hf_layout(tiny_bundle, tmp_path / "there")
    other = tmp_path / "other.jsonl"
    write_results(other, make_samples())
    with pytest.raises(DataError, match="another bundle"):
        write_hf_layout(tiny_bundle, tmp_path / "hub", results=[other])
    assert not (tmp_path / "hub").exists()


def test_damaged_bundle_is_not_published(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    with (root / "preprocess.onnx").open("r+b") as handle:
        handle.write(b"x")
    with pytest.raises(BundleError, match="SHA-256"):
        write_hf_layout(root, tmp_path / "hub")


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload of small files needs; keeps every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, Any]] = []
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({}, 403 if getattr(self.server, "refuse", False) else 200)

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Hub)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        text = body.decode()
        value = [json.loads(line) for line in text.splitlines()] if "/commit/" in self.path else json.loads(text)
        server.requests.append((self.command, self.path, value))
        if server.refuse:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in value["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._answer(
                {"commitOid": "0" * 40, "commitUrl": f"{server.url}/{REPO}/commit/{'0' * 40}", "success": True}
            )
        else:
            self._answer({"url": f"{server.url}/{REPO}", "name": REPO})

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A directory of the layout, with texts only."""
    root = tmp_path / "layout"
    (root / "web").mkdir(parents=True)
    (root / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (root / "web" / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize("reply", [False, None, "yes"])
def test_nothing_is_sent_unasked(small: Path, hub: Hub, reply: Any) -> None:
    """Only True is a yes. The question names every file, the sizes, the place and who will see it."""
    asked: list[str] = []

    def confirm(question: str) -> bool:
        asked.append(question)
        return reply  # type: ignore[no-any-return]

    assert push(small, REPO, confirm=confirm, endpoint=hub.url) is None
    assert hub.requests == []
    assert len(asked) == 1
    for needed in ("web/config.json", "README.md", "2 files", REPO, "private"):
        assert needed in asked[0]


@pytest.mark.parametrize("private", [True, False])
def test_upload(small: Path, hub: Hub, private: bool) -> None:
    """A real server receives one repository, as private as asked, and one commit with these bytes."""
    asked: list[str] = []

    def say(question: str) -> bool:
        asked.append(question)
        return True

    url = push(small, REPO, confirm=say, private=private, endpoint=hub.url)
    assert url is not None and url.startswith(hub.url)
    assert ("PUBLIC" in asked[0]) is not private
    (create,) = [value for _, path, value in hub.requests if path == "/api/repos/create"]
    assert (create["name"], create["organization"]) == ("tiny", "someone")
    assert create.get("private", create.get("visibility") == "private") is private
    (commit,) = [value for _, path, value in hub.requests if path.endswith(f"/{REPO}/commit/main")]
    sent = {
        row["value"]["path"]: base64.b64decode(row["value"]["content"]).decode()
        for row in commit
        if row["key"] == "file"
    }
    assert sent == {name: (small / name).read_text() for name in ("README.md", "web/config.json")}


def test_refused_upload(small: Path, hub: Hub) -> None:
    hub.refuse = True
    with pytest.raises(StorageError) as caught:
        push(small, REPO, confirm=lambda _: True, endpoint=hub.url)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_offline(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE holds for uploads too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError):
        push(small, REPO, confirm=lambda _: True, endpoint=hub.url)
    assert hub.requests == []


def test_odd_uploads(small: Path, tmp_path: Path) -> None:
    for repo in ("tiny", "a/b/c", "a b/c", "", "../x", "a/..", ".a/b"):
        with pytest.raises(UsageError, match="repository"):
            push(small, repo, confirm=lambda _: True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no README\.md"):
        push(tmp_path / "empty", REPO, confirm=lambda _: True)
    (small / "link").symlink_to("/etc/hostname")
    with pytest.raises(UsageError, match="a link"):
        listing(small)


def test_samples_without_a_bundle_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """Numbers that name no bundle can't be shown as this one's."""
    path = tmp_path / "results.jsonl"
    write_results(path, [Sample("latency", "edge", "fp32+f16", "ttft_ms", 1.0, "ms")])
    with pytest.raises(DataError):
        write_hf_layout(tiny_bundle, tmp_path / "hub", results=[path])


@pytest.mark.parametrize(
    ("stamp", "says"),
    [
        ({"checks": [{"gated": True, "tolerance": [1]}]}, r"has the tolerance '\[1\]'"),
        ({"checks": [{"gated": True, "tolerance": {"max_abs": "x"}}]}, "has the tolerance"),
        ({"checks": [{"gated": True, "tolerance": {"share": True}}]}, "has the tolerance"),
        ({"checks": [{"gated": True, "max_abs": "x"}]}, "has max_abs = 'x'"),
        ({"checks": [{"gated": True, "cosine": [1]}]}, "has cosine"),
        ({"checks": 5}, "are no list"),
        ({"checks": {"gated": True}}, "are no list"),
    ],
)
def test_a_stamp_of_other_types_is_named(stamp: dict[str, Any], says: str, tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    read_bundle(root).stamp({"fp32+f16": {"passed": True, **stamp}})
    with pytest.raises(BundleError, match=says) as caught:
        write_hf_layout(root, tmp_path / "hub")
    assert str(root / "verified.json") in caught.value.message and not (tmp_path / "hub").exists()


def test_results_of_other_types_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [s for s in make_samples() if s.runtime == "reference"]
    write_results(path, [Sample("environment", environment_id="e1", detail={"cpu": [1]}), *lines])
    with pytest.raises(DataError, match=r"odd\.jsonl: .*`cpu`"):
        write_hf_layout(tiny_checkpoint, tmp_path / "hub", results=[path])
    cpu = {"model": "<b>|Fast [CPU](http://x)"}
    write_results(path, [Sample("environment", environment_id="e1", detail={"cpu": cpu}), *lines])
    card = (write_hf_layout(tiny_checkpoint, tmp_path / "hub", results=[path]) / "README.md").read_text()
    assert "&lt;b&gt;\\|Fast \\[CPU\\](http://x)" in card


def test_names_stay_text_in_the_card(tiny_bundle: Path, tmp_path: Path) -> None:
    """Neither a heading nor a table carries markup that came with the files."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    opened = read_bundle(root)
    odd = "<img src=x> | [a](b) `c`"
    spec = replace(opened.spec, name=odd, llm_family=odd)
    write_manifest(root, spec, list(opened.files), opened.source, opened.tool_versions)
    check = {"stage": odd, "gated": True, "cosine": 0.9}
    read_bundle(root).stamp({odd: {"passed": True, "checks": [check]}})
    card = (write_hf_layout(root, tmp_path / "hub") / "README.md").read_text()
    plain = "&lt;img src=x&gt; \\| \\[a\\](b) \\`c\\`"
    assert f"\n# {plain}\n" in card and f"\n| {plain} | {plain} |" in card
    assert "<img" not in card and card.count(plain) == 4
