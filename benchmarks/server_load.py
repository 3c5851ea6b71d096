"""Many clients on one server: does every answer stay right, how long do they wait, does memory stay flat?

    python benchmarks/server_load.py --out load.jsonl                       # a random model of the nano architecture
    python benchmarks/server_load.py --bundle BUNDLE --seconds 120 --clients 16 --out load.jsonl
    python benchmarks/server_load.py --seconds 10 --requests 200            # a short try

Three parts, one server process: (1) one client asks every question of the mix, several times: its answers are what the
others must get, and the time that the server adds to the engine's own; (2) `--clients` clients ask the same for
`--seconds`, half of the answers streamed; (3) one client asks `--requests` times while the server's resident memory is
read. Pictures repeat, as in a chat, so the caches are in use. Raw samples go to --out, one JSON object a line; the
summary to stdout. Exit code 1: an error, an answer that differs, or memory that grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHAT = "/v1/chat/completions"
MAX_TOKENS = 24
FLAT = 0.02  # share by which memory may grow
SERVER = """
import sys
from tinyllava_edge.runtimes.engine import open_bundle
from tinyllava_edge.runtimes.server.options import ServerOptions
from tinyllava_edge.runtimes.server.serve import serve
bundle, build, threads = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
def opened(): return open_bundle(bundle, build, n_threads=threads, allow_unverified=True)
serve(opened, ServerOptions(port=0), say=lambda line: print(line, flush=True))
"""


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One sample: text, milliseconds by the client's clock, the server's own timings, or the error."""
        begin = time.perf_counter()
        first = None
        data = json.dumps(body).encode()
        self._connection.request("POST", CHAT, data, {"content-type": "application/json"})
        reply = self._connection.getresponse()
        if reply.status != 200:
            return {"status": reply.status, "error": reply.read().decode()[:300]}
        if body["stream"]:
            text, last, done = "", {}, False
            for line in iter(reply.readline, b""):
                first = first or time.perf_counter()
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    done = True
                    continue
                last = json.loads(line[6:])
                text += last["choices"][0]["delta"].get("content") or "" if last.get("choices") else ""
            if not done or "timings" not in last:
                return {"status": 200, "error": f"the stream broke off: {json.dumps(last)[:300]}"}
            timings = last["timings"]
        else:
            value = json.loads(reply.read())
            text, timings = value["choices"][0]["message"]["content"], value["timings"]
        end = time.perf_counter()
        engine_ms = timings["queue_ms"] + timings["ttft_ms"] + timings["decode_ms"]
        return {
            "status": 200,
            "text": text,
            "ms": 1000 * (end - begin),
            "first_ms": 1000 * (first - begin) if first else None,
            "engine_ms": engine_ms,
            "queue_ms": timings["queue_ms"],
        }


class Server:
    """The server's process."""

    def __init__(self, bundle: Path, build: str, threads: int) -> None:
        arguments = [sys.executable, "-c", SERVER, str(bundle), build, str(threads)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "://" not in line:
            sys.exit(f"the server did not start: {line}")
        self.port = int(line.split(";")[0].rpartition(":")[2])
        while self.get("/health")[0] != 200:
            if self.process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        reply = connection.getresponse()
        found = reply.status, reply.read()
        connection.close()
        return found

    def rss(self) -> int:
        """Resident bytes; Linux only."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def mix() -> list[dict[str, Any]]:
    """Questions with and without pictures, one and several turns."""
    urls = [_picture(seed) for seed in range(6)]
    questions = ["what color is the shape?", "is there a small blue circle?", "how many objects are there?"]
    found: list[list[dict[str, Any]]] = [[{"role": "user", "content": question}] for question in questions]
    for number, url in enumerate(urls):
        part = {"type": "image_url", "image_url": {"url": url}}
        user = {"role": "user", "content": [part, {"type": "text", "text": questions[number % 3]}]}
        found.append([user])
        found.append([user, {"role": "assistant", "content": "red"}, {"role": "user", "content": "and the other one?"}])
    return [{"messages": messages, "max_tokens": MAX_TOKENS} for messages in found]


def _picture(seed: int) -> str:
    from PIL import Image

    draw = np.random.default_rng(seed)
    rgb = np.kron(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((28, 28, 1), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def alone(server: Server, bodies: list[dict[str, Any]], rounds: int = 5) -> list[dict[str, Any]]:
    """Part 1. The first round fills the caches; its times are kept, but not counted."""
    client, samples = Client(server.port), []
    for round_ in range(rounds):
        for number, body in enumerate(bodies):
            for stream in (False, True):
                sample = client.ask({**body, "stream": stream})
                samples.append({"part": "alone", "round": round_, "number": number, "stream": stream, **sample})
    return samples


def together(
    server: Server, bodies: list[dict[str, Any]], clients: int, seconds: float, wanted: dict[int, str]
) -> list[dict[str, Any]]:
    """Part 2."""
    samples: list[dict[str, Any]] = []
    end = time.monotonic() + seconds

    def work(who: int) -> None:
        draw, client = random.Random(who), Client(server.port)
        while time.monotonic() < end:
            number, stream = draw.randrange(len(bodies)), draw.random() < 0.5
            try:
                sample = client.ask({**bodies[number], "stream": stream})
            except (OSError, http.client.HTTPException, ValueError) as error:
                sample, client = {"status": 0, "error": repr(error)}, Client(server.port)
            sample["right"] = sample.get("text") == wanted[number]
            samples.append({"part": "together", "client": who, "number": number, "stream": stream, **sample})

    threads = [threading.Thread(target=work, args=(who,)) for who in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return samples


def memory(server: Server, bodies: list[dict[str, Any]], requests: int) -> list[dict[str, Any]]:
    """Part 3: resident memory after every 20th request."""
    client, samples = Client(server.port), []
    for number in range(requests):
        sample = client.ask({**bodies[number % len(bodies)], "stream": bool(number % 2)})
        if sample["status"] != 200 or "error" in sample:
            samples.append({"part": "memory", "request": number, **sample})
        if number % 20 == 19:
            samples.append({"part": "memory", "request": number, "rss": server.rss()})
    return samples


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else float("nan")


def summarise(samples: list[dict[str, Any]], say: Callable[[str], None] = print) -> bool:
    """Print what was found; whether it is good."""
    errors = [s for s in samples if "error" in s]
    warm = [s for s in samples if s["part"] == "alone" and s["round"] and "ms" in s]
    many = [s for s in samples if s["part"] == "together" and "ms" in s]
    wrong = [s for s in many if not s["right"]]
    say(f"one client: {len(warm)} answers")
    for stream in (False, True):
        chosen = [s for s in warm if s["stream"] is stream]
        added = [s["ms"] - s["engine_ms"] for s in chosen]
        whole = [s["ms"] for s in chosen]
        name = "streamed" if stream else "whole"
        say(
            f"  {name}: p50 {percentile(whole, 0.5):.2f} ms, p95 {percentile(whole, 0.95):.2f} ms; "
            f"beyond the engine's own time: p50 {percentile(added, 0.5):.2f} ms, p95 {percentile(added, 0.95):.2f} ms"
        )
    clients = {s["client"] for s in many}
    whole = [s["ms"] for s in many]
    say(f"{len(clients)} clients: {len(many)} answers, {len(wrong)} differ from one client's, {len(errors)} errors")
    say(f"  p50 {percentile(whole, 0.5):.1f} ms, p95 {percentile(whole, 0.95):.1f} ms")
    first = [s["first_ms"] for s in many if s["first_ms"]]
    say(f"  first token of streams: p50 {percentile(first, 0.5):.1f} ms, p95 {percentile(first, 0.95):.1f} ms")
    for sample in [*errors[:3], *wrong[:3]]:
        say(f"  {json.dumps(sample)[:300]}")
    rss = [s["rss"] for s in samples if "rss" in s]
    quarter = max(1, len(rss) // 4)
    before, after = statistics.median(rss[:quarter]), statistics.median(rss[-quarter:])
    growth = after / before - 1
    say(f"memory over {20 * len(rss)} requests: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({growth:+.2%})")
    return not errors and not wrong and growth <= FLAT


def nano_bundle(work: Path) -> Path:
    """A bundle of the nano architecture with random weights whose answers don't hang on rounding."""
    from random_checkpoint import write_checkpoint

    from tinyllava_edge.export.bundle_writer import export_bundle

    bundle = work / "bundle"
    if not bundle.exists():
        if not (work / "checkpoint").exists():
            write_checkpoint("TinyLLaVA-base-NanoSig-Nano", work / "checkpoint", say=lambda line: None)
        export_bundle(work / "checkpoint", bundle, llm=("f16",), vision=("fp32",))
    return bundle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a random nano model by default")
    parser.add_argument("--build", default="", help="the bundle's first by default")
    parser.add_argument("--work", type=Path, default=Path("server-load"), help="where the random model goes")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=2000, help="of the memory part")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON lines with every sample")
    options = parser.parse_args()
    server = Server(options.bundle or nano_bundle(options.work), options.build, options.threads)
    try:
        bodies = mix()
        samples = alone(server, bodies)
        wanted = {s["number"]: s["text"] for s in samples if "text" in s}
        changed = [s for s in samples if s.get("text") != wanted.get(s["number"])]
        samples += together(server, bodies, options.clients, options.seconds, wanted)
        samples += memory(server, bodies, options.requests)
        good = summarise(samples) and not changed
        if changed:
            print(f"one client got {len(changed)} answers that differ from its others: {json.dumps(changed[0])[:300]}")
    finally:
        code = server.stop()
    print(f"the server left with exit code {code}")
    facts = {"part": "environment", "machine": platform.platform(), "cores": os.cpu_count(), "arguments": sys.argv[1:]}
    if options.out:
        lines = [json.dumps(sample, ensure_ascii=False) for sample in (facts, *samples)]
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
