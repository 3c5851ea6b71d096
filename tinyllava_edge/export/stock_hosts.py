"""What stock hosts need beside the two GGUFs: a Modelfile for Ollama, and the lines to type for all of them."""

from __future__ import annotations

from pathlib import Path

from ..errors import ExportError
from ..files import write_text
from ..prompt import Template
from ..runtimes.text import default_context
from ..spec import ModelSpec
from .mmproj import plain_name
from .mmproj_check import MmprojReport
from .profiles import PRESETS

SERVER_BATCH = 512  # rows that llama-server computes at once, its own default
PHONE_BOUNDS = f"--cache-ram 0 -np 1 -ub {SERVER_BATCH}"  # what a profile's count of an mmproj rests on
PHONE_THREADS = PRESETS["phone-arm64"].n_threads
MODELFILE, GUIDE = "Modelfile", "STOCK_HOSTS.md"  # README.md stays free for the Hub's model card

# Ollama puts `[img-0]` in front of the words. A newline belongs between the two, as everywhere in this family.
_USER = (
    '{{ $said := .Content }}{{ if and (ge (len $said) 7) (eq (slice $said 0 5) "[img-") (eq (slice $said 6 7) "]") }}'
    '{{ slice $said 0 7 }}{{ "SPACE\\n" }}{{ slice $said 7 }}{{ else }}{{ $said }}{{ end }}'
)

_TEXT = """\
# {name} in llama.cpp and its hosts

`{llm}` holds the language model, tokenizer and chat template, `{mmproj}` the vision tower and connector.
Both belong together.

## llama.cpp

```
llama-server -m {llm} --mmproj {mmproj} --jinja -c {context}{threads}
```

Then ask it, e.g. with a picture as a data URL:

```
curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' -d @- <<END
{{"temperature": 0, "messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "data:image/jpeg;base64,$(base64 < cat.jpg | tr -d '\\n')"}}}},
  {{"type": "text", "text": "What is this?"}}]}}]}}
END
```

Or once, without a server:

```
llama-mtmd-cli -m {llm} --mmproj {mmproj} --jinja -c {context}{threads} --temp 0 --image cat.jpg -p "What is this?"
```

## A phone with Termux (Android)

Not run on a phone: written from the documentation of llama.cpp and Termux.

```
pkg install llama-cpp                         # in Termux
termux-wake-lock                              # or Android puts the server to sleep
llama-server -m {llm} --mmproj {mmproj} --jinja -c {context} -t {phone_threads} {bounds} --host 127.0.0.1 --port 8080
```

Open http://127.0.0.1:8080 in the phone's browser and attach a picture there; `termux-wake-unlock` when done. Both files
belong below Termux's home, `~`, where llama.cpp's guide wants them for speed. `-t` is best the number of the phone's
fast cores. `--cache-ram 0` turns off the cache of earlier prompts, which otherwise grows up to 8 GiB, `-ub` bounds the
rows computed at once, and `-np 1` serves one conversation. `export --profile` counts an mmproj's memory with these; it
wasn't measured. A llama-server of your own is built with:

```
pkg install git cmake clang libandroid-spawn
git clone --depth 1 https://github.com/ggml-org/llama.cpp && cd llama.cpp
cmake -B build && cmake --build build --target llama-server -j {phone_threads}
```

## Ollama

```
ollama create {tag} -f Modelfile
ollama run {tag} "./cat.jpg What is this?"
```

## LM Studio

Both files go into one folder, two levels below its models folder:

```
mkdir -p ~/.lmstudio/models/local/{folder}
cp {llm} {mmproj} ~/.lmstudio/models/local/{folder}/
```

## PocketPal (Android, iOS)

Not run on a phone. The app pairs the two files only when it loads them itself:

1. Put both in one repository on the Hugging Face Hub, under these names: it knows an mmproj by `mmproj` in its name.
2. In the app choose *Models*, *+*, *Add from Hugging Face*, the repository, and the language model's file.
3. In the model's settings set the context to {context} and the threads to {phone_threads}.
4. Load it, and attach a picture in the chat.

A file added from the phone's storage answers without pictures.

## What differs from the model in these hosts

{differences}
"""

_RESIZE = """

Bring pictures to size before they are sent, in Python:

```python
from PIL import Image
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.image import load_image
from tinyllava_edge.runtimes.fit import fit_picture

spec = read_bundle(".").spec
Image.fromarray(fit_picture(load_image("cat.jpg"), spec)).save("cat-{side}.png")
```"""


def modelfile(
    llm_file: str,
    mmproj_file: str,
    spec: ModelSpec,
    template: Template,
    first_space: bool = False,
    n_ctx: int | None = None,
) -> str:
    """Ollama's Modelfile: both files, our prompt as a Go template, the end-of-turn token, greedy answers.

    `first_space` as in chat_template; `n_ctx` positions, the runtimes' own default if none are given.

    Raises:
        ExportError: the template is a captioning one, which has no conversation.
    """
    if template.caption_only:
        raise ExportError(
            f"{spec.name}: template {template.name!r} holds no conversation", "finetune the model first, then export it"
        )
    prompt = (
        ('{{ " " }}' if first_space else "")
        + "{{ if .System }}{{ .System }}{{ else }}"
        + template.system
        + "{{ end }} "
        + '{{ range .Messages }}{{ if eq .Role "user" }}USER: '
        + _USER.replace("SPACE", " " if first_space else "")
        + " ASSISTANT:"
        '{{ else if eq .Role "assistant" }} {{ .Content }}' + template.end_of_turn + "{{ end }}{{ end }}"
    )
    return (
        f"FROM ./{llm_file}\nFROM ./{mmproj_file}\n"
        f'TEMPLATE """{prompt}"""\n'
        f'PARAMETER stop "{template.end_of_turn}"\n'
        f"PARAMETER num_ctx {n_ctx or default_context(spec)}\n"
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"
    )


def write_stock_files(
    root: Path,
    *,
    name: str,
    llm_file: str,
    mmproj_file: str,
    spec: ModelSpec,
    template: Template,
    report: MmprojReport | None,
    first_space: bool = False,
    run_with: tuple[int, int] | None = None,
) -> list[Path]:
    """Write `Modelfile` and `STOCK_HOSTS.md` beside the two GGUFs.

    Args:
        root: directory that holds both.
        name: model name.
        llm_file: name of the text GGUF; the first part of a split one.
        mmproj_file: name of the mmproj GGUF.
        spec: the checkpoint's spec.
        template: the conversation template that the model was trained with.
        first_space: see chat_template.
        report: what check_mmproj measured; its defects are told in plain words. None where nothing was measured.
        run_with: a profile's positions and threads.

    Raises:
        ExportError: the template is a captioning one, or a file name can't stand in a Modelfile.
    """
    for file in (llm_file, mmproj_file):
        if Path(file).name != file or not file.isprintable() or any(c in file for c in " \"'`$\\"):
            raise ExportError(f"file name {file!r} can't stand in a Modelfile or a command", "choose a plain name")
    context, threads = run_with or (default_context(spec), None)
    text = _TEXT.format(
        name=name,
        folder=plain_name(name),
        tag=plain_name(name).lower(),
        llm=llm_file,
        mmproj=mmproj_file,
        context=context,
        threads=f" -t {threads}" if threads else "",
        bounds=PHONE_BOUNDS,
        phone_threads=threads or PHONE_THREADS,
        differences=_differences(spec, report),
    )
    paths = [root / MODELFILE, root / GUIDE]
    ollama = modelfile(llm_file, mmproj_file, spec, template, first_space, context)
    for path, content in zip(paths, (ollama, text), strict=True):
        write_text(path, content)
    return paths


def _differences(spec: ModelSpec, report: MmprojReport | None) -> str:
    """The measured defects, then what holds for every model."""
    items = ["Nothing was measured: run `verify` with the checkpoint at hand."] if report is None else []
    if report is not None:
        worst = min(picture.host for picture in report.pictures)
        if report.exact:
            items.append(
                f"Image embeddings equal the model's: cosine {worst:.6f} at the worst of {len(report.pictures)} "
                f"pictures, measured with llama-cpp-python {report.engine}."
            )
        items += [_sentence(defect) for defect in report.defects]
    items.append(
        "Special-token text that a user types, such as an end-of-turn mark, becomes that token; tinyllava-edge's own "
        "runtime takes it for plain text."
    )
    items.append("Hosts draw tokens at random unless told otherwise; `temperature` 0 gives the greedy answer.")
    listed = "\n".join(f"- {item}" for item in items)
    needs_resize = report is not None and any(" first" in defect[-8:] for defect in report.defects)
    return listed + (_RESIZE.format(side=spec.image_size) if needs_resize else "")


def _sentence(text: str) -> str:
    start = text if text.startswith("llama.cpp") else text[0].upper() + text[1:]
    return start + "."
