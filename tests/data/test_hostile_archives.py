"""Archives that someone else made, or broke: one clear error that names archive and member, and bounded memory."""

from __future__ import annotations

import io
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllava_edge.data import packed, zip_members
from tinyllava_edge.data.picture_store import PictureStore, open_store
from tinyllava_edge.data.tar_members import tar_members
from tinyllava_edge.errors import DataError, ImageError
from tinyllava_edge.image import MAX_FILE_BYTES

from .archives import link, make_tar, make_zip

FILES = {"a.png": b"one" * 100, "b/c.jpg": bytes(range(256)) * 40}


def opened(path: Path) -> PictureStore:
    return open_store([path], path.parent / "index")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(NAMES, st.binary(max_size=300)), max_size=5, unique_by=lambda file: file[0]),
    front=st.binary(max_size=9).map(lambda data: data.replace(b"PK", b"")),
    comment=st.binary(max_size=9).map(lambda data: data.replace(b"PK", b"")),
    wide=st.booleans(),
)
def test_zip_members_are_those_of_zipfile(
    files: list[tuple[str, bytes]], front: bytes, comment: bytes, wide: bool, tmp_path: Path
) -> None:
    path, out = tmp_path / "x.zip", io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=wide) as member:
                member.write(data)
        archive.comment = comment
    path.write_bytes(front + out.getvalue())  # as in a self-extracting file
    found = list(zip_members.zip_members(path))
    with zipfile.ZipFile(path) as archive, path.open("rb") as handle:
        wanted = [info for info in archive.infolist() if not info.filename.endswith("/")]
        assert [(m.name, m.size, m.crc) for m in found] == [(i.filename, i.file_size, i.CRC) for i in wanted]
        for member, info in zip(found, wanted, strict=True):
            assert packed.read_member(handle.fileno(), member, "x") == archive.read(info)


def test_a_zip_directory_of_64_bit_offsets(tmp_path: Path) -> None:
    """What a file of more than 4 GiB or 65,535 members has; made by hand from a small one."""
    path = make_zip(tmp_path / "x.zip", FILES)
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    size, offset = struct.unpack_from("<LL", data, end + 12)
    head = data.rfind(b"PK\1\2")  # the last entry's offset and sizes move into an extra field
    packed_size, unpacked_size, name_size = (
        *struct.unpack_from("<LL", data, head + 20),
        *struct.unpack_from("<H", data, head + 28),
    )
    place = struct.unpack_from("<L", data, head + 42)[0]
    extra = struct.pack("<HHQQQ", 1, 24, unpacked_size, packed_size, place)
    entry = bytearray(data[head:end])
    struct.pack_into("<LL", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, len(extra))
    struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
    entry[46 + name_size : 46 + name_size] = extra
    directory = data[offset:head] + bytes(entry)
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(directory), 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:offset] + directory + record + locator + last)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("b/c.jpg") == FILES["b/c.jpg"]  # so the file above is right
    assert opened(path).read("b/c.jpg") == FILES["b/c.jpg"] and opened(path).read("a.png") == FILES["a.png"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_leave_the_archive_can_not_be_asked_for(kind: str, tmp_path: Path) -> None:
    files = {"../up.png": b"x", "/root.png": b"x", "a/../../up.png": b"x", "good.png": b"x", "w\\in.png": b"x"}
    path = (make_zip if kind == "zip" else make_tar)(tmp_path / f"x.{kind}", files)
    store = opened(path)
    assert "good.png" in store
    for name in [*files, "up.png", "root.png", f"{path.name}/../up.png", f"{path.name}//root.png", "w/in.png"]:
        assert (name == "good.png") == (name in store), name
    assert not (tmp_path.parent / "up.png").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_of_two_members_with_one_name_the_later_counts_as_when_unpacked(kind: str, tmp_path: Path) -> None:
    files = [("a.png", b"first"), ("b.png", b"x"), ("./a.png", b"second")]
    path = (make_zip if kind == "zip" else make_tar)(tmp_path / f"x.{kind}", files)
    assert opened(path).read("a.png") == b"second"


def patched(path: Path, changes: dict[tuple[bytes, int], bytes]) -> Path:
    """Overwrite bytes at an offset behind the first place of a signature."""
    data = bytearray(path.read_bytes())
    for (signature, offset), value in changes.items():
        at = data.index(signature) + offset
        data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


LOCAL, ENTRY = b"PK\3\4", b"PK\1\2"


def damaged_zip(case: str, path: Path) -> Path:
    bomb = b"\0" * (MAX_FILE_BYTES + 1)
    if case == "bomb":
        return make_zip(path, {"a.png": bomb})
    if case == "bomb that lies":  # 64 MiB of zeros in 64 KiB, announced as 1,000 bytes
        make_zip(path, {"a.png": bomb})
        return patched(path, {(ENTRY, 20): struct.pack("<LL", 1000, 1000)})
    if case == "packed size of gigabytes":
        return patched(make_zip(path, FILES), {(ENTRY, 20): struct.pack("<L", 0xFFFFFFF0)})
    if case == "encrypted":
        return patched(make_zip(path, FILES), {(ENTRY, 8): b"\1\0"})
    if case == "lzma":
        return make_zip(path, FILES, zipfile.ZIP_LZMA)
    if case == "crc":
        return patched(make_zip(path, FILES), {(ENTRY, 16): b"\0\0\0\0"})
    if case == "contents":
        return patched(make_zip(path, FILES), {(LOCAL, 36): b"\xff\xff\xff"})
    if case == "stored contents":
        return patched(make_zip(path, FILES, zipfile.ZIP_STORED), {(LOCAL, 36): b"\xff"})
    if case == "no local header":
        return patched(make_zip(path, FILES), {(LOCAL, 0): b"XX"})
    assert case == "offset behind the end"
    return patched(make_zip(path, FILES), {(ENTRY, 42): struct.pack("<L", 1 << 30)})


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "bomb": "67,108,865 bytes, limit 67,108,864",
        "bomb that lies": "damaged",
        "packed size of gigabytes": "damaged",
        "encrypted": "encrypted",
        "lzma": "packed with LZMA",
        "crc": "CRC-32 differs",
        "contents": "damaged",
        "stored contents": "CRC-32 differs",
        "no local header": "no header at byte 0",
        "offset behind the end": "cut off at 0",
    }.items(),
)
def test_a_hostile_zip_member_is_named(case: str, words: str, tmp_path: Path) -> None:
    store = opened(damaged_zip(case, tmp_path / "x.zip"))
    with pytest.raises(ImageError, match=r"x\.zip: a\.png: ") as error:
        store.read("a.png")
    assert words in error.value.message and "\n" not in error.value.message and error.value.hint
    if case in ("bomb", "encrypted", "lzma"):  # told without reading it, so that the row is refused at the start
        assert words in store.fault("a.png")
    if not case.startswith(("bomb", "lzma")):
        assert store.read("b/c.jpg") == FILES["b/c.jpg"]


def test_a_member_that_lies_about_its_size_is_never_unpacked_beyond_it(tmp_path: Path) -> None:
    store = opened(damaged_zip("bomb that lies", tmp_path / "x.zip"))
    tracemalloc.start()
    with pytest.raises(ImageError):
        store.read("a.png")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_is_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    whole = (make_zip if kind == "zip" else make_tar)(tmp_path / f"x.{kind}", FILES).read_bytes()
    end = len(whole) - 1 if kind == "zip" else 14 * 512 + 511  # a tar file is padded with zeros to 10 KiB
    for cut in [*range(0, end, 97), end]:
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"cut\.{kind}: truncated or damaged {kind} file") as error:
            opened(path)
        assert error.value.hint
    assert not [file for file in (tmp_path / "index").iterdir() if file.suffix == ".sqlite"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["zip", "tar"]))
def test_flipped_bytes_give_bytes_or_one_of_our_errors(data: st.DataObject, kind: str, tmp_path: Path) -> None:
    path = (make_zip if kind == "zip" else make_tar)(tmp_path / f"x.{kind}", FILES)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(len(whole), 8192) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        store = opened(path)
        for name in FILES:
            if name in store:
                store.read(name)
    except (DataError, ImageError) as error:
        assert f"x.{kind}" in error.message and "\n" not in error.message


@pytest.mark.parametrize("suffix", ["x.tar.gz", "x.tgz", "x.tar.xz", "x.tar", "x.tar.bz2", "x.zip"])
def test_compressed_tars_are_refused_with_the_next_step(suffix: str, tmp_path: Path) -> None:
    mode = {"xz": "w:xz", "bz2": "w:bz2"}.get(suffix.split(".")[-1], "w:gz")
    path = tmp_path / suffix
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=suffix) as error:
        opened(path)
    assert suffix == "x.zip" or "plain .tar" in error.value.hint


def test_links_and_devices_are_no_members(tmp_path: Path) -> None:
    others = [
        link("link.png", "/etc/passwd"),
        link("hard.png", "a.png", tarfile.LNKTYPE),
        link("null.png", "", tarfile.CHRTYPE),
        link("pipe.png", "", tarfile.FIFOTYPE),
        link("dir.png", "", tarfile.DIRTYPE),
    ]
    path = make_tar(tmp_path / "x.tar", FILES, others)
    store = opened(path)
    assert all(info.name not in store for info in others) and "a.png" in store
    names = [m if isinstance(m, str) else m.name for m in tar_members(path)]
    assert names == [*FILES, "link.png", "hard.png", "null.png", "pipe.png"]


def header(**fields: Any) -> bytes:
    info = tarfile.TarInfo("a.png")
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("case", "data"),
    {
        "no bytes": b"",
        "half a block": b"x" * 300,
        "noise": b"x" * 2048,
        "a size of exabytes": header(size=1 << 60) + b"\0" * 1024,
        "a size below zero": header(size=-1024) + b"\0" * 1024,
        "a name of gigabytes": header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 34) + b"\0" * 1024,
        "a size below zero of an unknown kind": header() + header(type=b"Z", size=-512) + b"\0" * 1024,
        "headers of headers": header(type=tarfile.XHDTYPE, size=0) * 3000 + b"\0" * 1024,
        "a second archive": header() + b"\0" * 1024 + header() + b"\0" * 1024,
        "a wrong header": header() + b"x" * 512 + b"\0" * 1024,
        "no end mark": header(),
    }.items(),
)
def test_a_hostile_tar_is_named(case: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: ") as error:
        opened(path)
    assert "\n" not in error.value.message and error.value.hint


def test_a_header_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as out:  # a sparse file
        out.write(header(type=tarfile.GNUTYPE_LONGNAME, size=100 << 20))
        out.truncate(200 << 20)
    tracemalloc.start()
    with pytest.raises(DataError, match="a header of 104857600 bytes"):
        opened(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_picture_beyond_the_limit_in_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as out:  # a sparse file: nothing is written
        out.write(header(size=MAX_FILE_BYTES + 1))
        out.truncate(512 + MAX_FILE_BYTES + 512 + 1024)
    store = opened(path)
    assert "limit" in store.fault("a.png")
    with pytest.raises(ImageError, match=r"x\.tar: a\.png: 67,108,865 bytes, limit"):
        store.read("a.png")


def test_missing_paths_are_named(tmp_path: Path) -> None:
    for name in ("none", "none.zip"):
        with pytest.raises(DataError, match="no such folder or archive"):
            opened(tmp_path / name)
    (tmp_path / "x.7z").write_bytes(b"7z")
    with pytest.raises(DataError, match="neither a folder nor"):
        opened(tmp_path / "x.7z")


def test_names_in_old_code_pages_are_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("xx.png", b"1")
        archive.writestr("yy.png", b"2")
        archive.writestr("zz.png", b"3")
    data = (
        out.getvalue()
        .replace(b"xx.png", "ü".encode() + b".png")
        .replace(b"yy.png", b"y\x81.png")
        .replace(b"zz.png", b"z\0.png")
    )
    (tmp_path / "x.zip").write_bytes(data)
    store = opened(tmp_path / "x.zip")
    assert store.read("ü.png") == b"1" and store.read("yü.png") == b"2"
    assert "z\0.png" not in store and "z" not in store
