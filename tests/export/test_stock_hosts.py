"""The files for stock hosts: what they say, and that the prompt in them is the one that the model was trained with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.mmproj_check import MmprojReport, PictureCosines
from tinyllava_edge.export.stock_hosts import modelfile, write_stock_files
from tinyllava_edge.prompt import IMAGE_MARKER, TEMPLATES, Turn, build, get_template, render
from tinyllava_edge.spec import model_spec

SPEC = model_spec("TinyLLaVA-base-Sig-TL")
LLM, MMPROJ = "llm-q4_k_m.gguf", "mmproj-TinyLLaVA-base-Sig-TL-f16.gguf"
GO = """\
package main

import (
    "encoding/json"
    "os"
    "text/template"
)

type message struct{ Role, Content string }
type values struct {
    System   string
    Messages []message
}

func main() {
    var asked []values
    if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
    source, _ := os.ReadFile(os.Args[1])
    parsed := template.Must(template.New("").Parse(string(source)))
    for _, one := range asked {
        if err := parsed.Execute(os.Stdout, one); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


def report(*defects: str, exact: bool = True) -> MmprojReport:
    pictures = (PictureCosines("photo", False, 0.9999931, 0.9999921, 0.9999, 0.5, None),)
    return MmprojReport(MMPROJ, "0.3.36", True, exact, 0.9999, 729, 729, pictures, defects)


def write(root: Path, found: MmprojReport | None = None, name: str = SPEC.name) -> list[Path]:
    return write_stock_files(
        root, name=name, llm_file=LLM, mmproj_file=MMPROJ, spec=SPEC, template=get_template("llama"), report=found
    )


def test_files(tmp_path: Path) -> None:
    """Both files, with the lines that hosts need, and nothing of a placeholder left over."""
    paths = write(tmp_path, report())
    assert [path.name for path in paths] == ["Modelfile", "STOCK_HOSTS.md"]
    text = paths[1].read_text()
    assert f"llama-server -m {LLM} --mmproj {MMPROJ} --jinja -c 2048\n" in text
    for needed in ("ollama create tinyllava-base-sig-tl -f Modelfile", "PocketPal", "LM Studio", "cosine 0.999992"):
        assert needed in text
    assert not re.search(
        r"\{(name|llm|mmproj|side|tag|folder|context|threads|phone_threads|bounds|differences)\}", text
    )
    lines = paths[0].read_text().splitlines()
    assert lines[:2] == [f"FROM ./{LLM}", f"FROM ./{MMPROJ}"]
    assert 'PARAMETER stop "</s>"' in lines


def test_a_profiles_context_and_threads(tmp_path: Path) -> None:
    """Every line to type has them, Ollama's file too; without a profile only a phone's lines name threads."""
    plain = write(tmp_path, report())[1].read_text()
    assert plain.count("-c 2048") == 3 and plain.count(" -t 4") == 1 and "http://127.0.0.1:8080" in plain
    assert "-t 4 --cache-ram 0 -np 1 -ub 512 --host 127.0.0.1 --port 8080\n" in plain  # what a profile's count rests on
    arguments = {"llm_file": LLM, "mmproj_file": MMPROJ, "spec": SPEC, "template": get_template("llama")}
    paths = write_stock_files(tmp_path, name="x", report=report(), run_with=(1024, 6), **arguments)  # type: ignore[arg-type]
    ollama, guide = (path.read_text() for path in paths)
    assert guide.count("--jinja -c 1024 -t 6") == 3 and "context to 1024 and the threads to 6" in guide
    assert "PARAMETER num_ctx 1024\n" in ollama and "2048" not in ollama + guide
    assert guide.count("Not run on a phone") == 2


def test_defects_are_told(tmp_path: Path) -> None:
    defect = "pictures that are not square: cosine 0.5. Bring pictures to 384 x 384 first"
    text = write(tmp_path, report(defect, exact=False))[1].read_text()
    assert "Pictures that are not square: cosine 0.5. Bring pictures to 384 x 384 first." in text
    assert "fit_picture" in text
    assert "equal the model's" not in text
    assert "Nothing was measured" in write(tmp_path, None)[1].read_text()


def test_curl_body_is_json(tmp_path: Path) -> None:
    """What the shell would send, the picture's bytes put in."""
    text = write(tmp_path, report())[1].read_text()
    body = text.split("<<END\n")[1].split("\nEND\n")[0]
    value = json.loads(re.sub(r"\$\(.*?\)", "AAAA", body))
    assert value["messages"][0]["content"][0]["image_url"]["url"] == "data:image/jpeg;base64,AAAA"


@pytest.mark.parametrize("name", ["a b", 'x"y.gguf', "../up.gguf", "a$b", "back\\slash", "line\nbreak"])
def test_odd_file_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        write_stock_files(
            tmp_path, name="x", llm_file=name, mmproj_file=MMPROJ, spec=SPEC, template=TEMPLATES["llama"], report=None
        )


def test_odd_model_name(tmp_path: Path) -> None:
    """A user's own name may hold anything printable; folder and tag may not."""
    text = write(tmp_path, report(), name="My model; rm -rf ~")[1].read_text()
    assert "ollama create my-model-rm--rf -f Modelfile" in text
    assert "models/local/My-model-rm--rf\n" in text


def test_captioning_has_no_conversation() -> None:
    with pytest.raises(ExportError):
        modelfile(LLM, MMPROJ, SPEC, TEMPLATES["pretrain"])


@pytest.fixture(scope="module")
def go_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Go's template engine: argument: the template's file; stdin: the values; stdout: texts, each ended by 0."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no go compiler: the Modelfile's template is not executed")
    root = tmp_path_factory.mktemp("go")
    (root / "main.go").write_text(GO)
    done = subprocess.run([go, "build", "-o", "execute", "main.go"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "execute"


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.caption_only])
def test_ollama_prompt(name: str, tmp_path: Path, go_template: Path) -> None:
    """Go gives our prompt, `[img-0]` in the picture's place: one turn, three turns, no picture, a system text."""
    template = get_template(name)
    asked, wanted = [], []
    for turns in (
        [Turn("<image>\nwhat is it?")],
        [Turn("what is it?")],
        [Turn("<image>\nIs [img-0] red?", "no"), Turn("what then?", "blue and\nsmall"), Turn("[img")],
    ):
        messages = []
        for turn in turns:
            said = turn.question.replace(f"{IMAGE_MARKER}\n", "[img-0]")  # as Ollama joins picture and words
            messages.append({"Role": "user", "Content": said})
            if turn.answer is not None:
                messages.append({"Role": "assistant", "Content": turn.answer})
        asked.append({"System": "", "Messages": messages})
        wanted.append(render(build(turns, template), template).replace(IMAGE_MARKER, "[img-0]"))
    brief = [{"Role": "system", "Content": "Be brief."}, *asked[1]["Messages"]]
    asked.append({"System": "Be brief.", "Messages": brief})
    wanted.append(wanted[1].replace(template.system, "Be brief."))
    source = tmp_path / "template"
    source.write_text(modelfile(LLM, MMPROJ, SPEC, template).split('TEMPLATE """')[1].split('"""')[0])
    done = subprocess.run([go_template, source], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == wanted
