"""The grid's comma lists, generated pictures, and the decoder's tests on a real decoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks import bench_grid as grid
from tinyllava_edge.errors import UsageError


def test_lists() -> None:
    assert grid.counts(" 128, 512,128 ", "-p") == (128, 512) and grid.counts("", "-p") == ()
    assert grid.image_sizes("64,640x480,64x64") == ((64, 64), (640, 480))
    assert grid.image_sizes([64, "32x8", [5, 6]]) == ((64, 64), (32, 8), (5, 6))
    assert grid.devices("cpu,cuda,cpu") == ("cpu", "cuda")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1,,2", "x", "1e3", "99999999", "٣", "1 2", ","])
def test_wrong_counts_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="-p "):
        grid.counts(text, "-p")


@pytest.mark.parametrize("text", ["0", "64x", "x64", "64x0", "8193", "99999x1", "64X64", "1x2x3", "64,,32", "-5"])
def test_wrong_sizes_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="--image-size "):
        grid.image_sizes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    for read in (lambda: grid.counts(text, "-t", 64), lambda: grid.image_sizes(text), lambda: grid.devices(text)):
        try:
            assert all(read())
        except UsageError as error:
            assert "\n" not in error.message or "\n" in text


def test_what_is_measured(tmp_path: Path) -> None:
    def spelled(*arguments: object) -> list[str]:
        return [task.name + task.mark for task in grid.tasks(*arguments, tmp_path)]  # type: ignore[arg-type]

    assert spelled(None, [], [], []) == ["answer"]
    assert spelled(None, [], [8, 16], [4]) == ["pp8", "pp16", "tg4"]  # llama-bench's alone
    assert spelled(None, [(8, 8), (9, 9)], [8], []) == ["answer", "answer@9x9", "pp8"]
    picture = grid.scene((20, 10), tmp_path)
    assert spelled(picture, [], [8], []) == ["answer", "pp8"]
    assert grid.tasks(picture, [], [], [], tmp_path)[0].picture_size == (20, 10)
    with pytest.raises(UsageError, match="size of its own"):
        spelled(picture, [(8, 8)], [], [])


def test_scenes_have_the_size_and_are_the_same_every_time(tmp_path: Path) -> None:
    from PIL import Image

    for size in ((64, 64), (640, 480), (1, 7)):
        path = grid.scene(size, tmp_path)
        first = hashlib.sha256(path.read_bytes()).hexdigest()
        assert Image.open(path).size == size
        assert hashlib.sha256(grid.scene(size, tmp_path).read_bytes()).hexdigest() == first


def test_decoder_tests_run_what_they_say(tiny_bundle: Path) -> None:
    """`pp` is one call over all positions, `tg` one call a token from position 0; the context is empty afterwards."""
    from tinyllava_edge.runtimes.edge import open_edge

    with open_edge(tiny_bundle, "fp32+f32", n_threads=1, allow_unverified=True) as runtime:
        alone = runtime.answer(None, "what?", max_tokens=4)
        calls: list[list[int]] = []
        decode = runtime.llama.decode_tokens

        def recorded(ids: list[int], positions: object, **options: object) -> object:
            calls.append(list(positions))  # type: ignore[call-overload]
            return decode(ids, positions, **options)  # type: ignore[arg-type]

        runtime.llama.decode_tokens = recorded  # type: ignore[method-assign,assignment]
        assert grid.decoder_test(runtime.llama, grid.Task("pp", 300)) > 0  # longer than the runtime's batch
        assert calls == [list(range(300))]
        calls.clear()
        assert grid.decoder_test(runtime.llama, grid.Task("tg", 3)) > 0
        assert calls == [[0], [1], [2]]
        del runtime.llama.decode_tokens
        ids = grid.any_tokens(runtime.llama, 50)
        assert ids[0] == runtime.llama.bos and len(set(ids)) > 40 and ids == grid.any_tokens(runtime.llama, 50)
        assert runtime.answer(None, "what?", max_tokens=4).token_ids == alone.token_ids
