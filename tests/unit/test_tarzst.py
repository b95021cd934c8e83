"""tar.zst images: what goes in comes out, on any number of cores, and nothing hostile does."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import zstandard

from stager.errors import (
    DeniedError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StagerError,
    UsageError,
)
from stager.formats import tarstream, tarzst
from stager.formats.tarstream import Member, header, padding
from stager.formats.tarzst import MIN_FRAME_SIZE, Writer, extract, extracting

MTIME = 1_700_000_000
SMALL = MIN_FRAME_SIZE
Members = list[tuple[Member, bytes]]


def file(
    path: str, content: bytes = b"", mode: int = 0o644, mtime: int = MTIME
) -> tuple[Member, bytes]:
    return Member(path, "file", mode, mtime, len(content)), content


def directory(path: str, mode: int = 0o755, mtime: int = MTIME) -> tuple[Member, bytes]:
    return Member(path, "dir", mode, mtime), b""


def symlink(path: str, target: str) -> tuple[Member, bytes]:
    return Member(path, "symlink", 0o777, MTIME, target=target), b""


def hardlink(path: str, target: str) -> tuple[Member, bytes]:
    return Member(path, "hardlink", 0o644, MTIME, target=target), b""


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def environment() -> Members:
    """Files of many to a frame, files of many frames, and every other kind of member."""
    members = [directory(".", 0o755), directory("bin"), directory("lib", 0o700), directory("empty")]
    members += [
        file("bin/python", b"\x7fELF" + noise(3 * SMALL), 0o755),
        symlink("bin/python3", "python"),
    ]
    members += [directory("lib/closed", 0o555, mtime=MTIME - 5)]
    for number in range(40):
        members.append(directory(f"lib/package{number}", mtime=MTIME + number))
        for name in ("__init__.py", "data", "line\nbreak", os.fsdecode(b"\xff\xfe")):
            content = noise(number * 40, number)
            members.append(file(f"lib/package{number}/{name}", content, mtime=MTIME + number))
    members += [
        file("lib/closed/secret", b"0", mode=0),
        file("lib/closed/read-only", b"r" * 5000, mode=0o444, mtime=0),
        file("lib/" + "n" * 250, b"long", mtime=2**32 - 1),
        hardlink("lib/same", "bin/python"),
        hardlink("lib/same again", "lib/same"),
        symlink("lib64", "lib"),
        symlink("lib/package1/up", "../../bin/./python3"),
        # Sizes at which the end of the data, of its block and of the frame nearly meet.
        *(
            file(f"size {size}", noise(size, size))
            for edge in (SMALL - 512, SMALL, 2 * SMALL - 512, 2 * SMALL)
            for size in range(edge - 2, edge + 3)
        ),
        file("closed-large", noise(5 * SMALL + 7), mode=0o400),
    ]
    return members


def pack(members: Members, **options: Any) -> bytes:
    sink = io.BytesIO()
    with Writer(sink, **{"frame_size": SMALL, "threads": 2, **options}) as writer:
        for member, data in members:
            writer.write_member(member, data)
    return sink.getvalue()


Tree = dict[str, tuple[object, ...]]


def expected(members: Members) -> Tree:
    contents = {member.path: (member, data) for member, data in members}
    found: Tree = {}
    for member, data in members:
        real, content = member, data
        while real.kind == "hardlink":
            real, content = contents[real.target]
        mode = real.mode & 0o777 if member.path != "." else 0o700
        if real.kind == "symlink":
            found[member.path] = ("symlink", member.target)
        else:
            found[member.path] = (real.kind, mode, real.mtime, content)
    return found


def snapshot(root: Path) -> Tree:
    found: Tree = {}
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files] + ["."] * (parent == str(root)):
            path = os.path.join(parent, name)
            info = os.lstat(path)
            relative = os.path.relpath(path, root)
            assert info.st_uid == os.geteuid()
            if stat.S_ISLNK(info.st_mode):
                found[relative] = ("symlink", os.readlink(path))
                continue
            mode, mtime = stat.S_IMODE(info.st_mode), int(info.st_mtime)
            if stat.S_ISDIR(info.st_mode):
                found[relative] = ("dir", mode, mtime, b"")
            else:
                if not mode & 0o400:
                    os.chmod(path, 0o600)
                found[relative] = ("file", mode, mtime, Path(path).read_bytes())
    return found


def unpack(image: bytes | Path, target: Path, **options: Any) -> None:
    """Extract an image as it is: however damaged, its checksum is the expected one."""
    if isinstance(image, bytes):
        source = target.parent / "image.tar.zst"
        source.write_bytes(image)
    else:
        source = image
    defaults: dict[str, Any] = {
        "workers": 2,
        "max_files": 10_000,
        "max_bytes": 1 << 30,
        "crc32": zlib.crc32(source.read_bytes()) if source.is_file() else 0,
        "allowed_links": no_links,
    }
    extract(str(source), str(target), **{**defaults, **options})


def no_links(path: str, target: str) -> bool:
    return False


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """No test leaves a process, a descriptor or, after an error, a part of the tree."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert sorted(os.listdir("/proc/self/fd")) == before


def refused(
    image: bytes, tmp_path: Path, error: type[StagerError] = IntegrityError, **options: Any
) -> StagerError:
    """Extraction fails with ``error`` and leaves nothing; the error is returned."""
    target = tmp_path / "tree"
    with pytest.raises(error) as caught:
        unpack(image, target, **options)
    assert type(caught.value) is error
    assert not os.path.lexists(target)
    return caught.value


# There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5, 1000])
def test_round_trip(workers: int, tmp_path: Path) -> None:
    members = environment()
    image = pack(members)
    unpack(image, tmp_path / "tree", workers=workers)
    assert snapshot(tmp_path / "tree") == expected(members)
    for path in ("lib/same", "lib/same again"):
        assert (tmp_path / "tree" / path).samefile(tmp_path / "tree/bin/python")


def test_round_trip_with_the_default_frame_size(tmp_path: Path) -> None:
    members = [directory("."), file("a", noise(9 << 20)), file("b", noise(3 << 20)), file("c")]
    unpack(pack(members, frame_size=tarzst.FRAME_SIZE), tmp_path / "tree")
    assert snapshot(tmp_path / "tree") == expected(members)


def test_an_archive_without_members(tmp_path: Path) -> None:
    unpack(pack([]), tmp_path / "tree", max_files=0, max_bytes=0)
    assert os.listdir(tmp_path / "tree") == []


def test_the_image_does_not_depend_on_threads_or_pieces() -> None:
    members = environment()
    image = pack(members, threads=1)
    for threads in (0, 2, 7):
        assert pack(members, threads=threads) == image
    sink = io.BytesIO()
    with Writer(sink, frame_size=SMALL) as writer:
        buffer = bytearray()
        for member, data in members:
            buffer[:] = data
            halves = (memoryview(bytes(buffer))[:1000], b"", bytearray(data[1000:]))
            writer.write_member(member, memoryview(buffer) if len(data) % 2 else iter(halves))
            buffer[:] = bytes(len(buffer))  # what was written must not change with it
            buffer = bytearray()
    assert sink.getvalue() == image


def test_level_is_used() -> None:
    members = [file("text", b"".join(b"line %d\n" % (n * n) for n in range(50_000)))]
    assert len(pack(members, level=15)) < len(pack(members, level=1))


def test_zstd_and_tar_read_it(tmp_path: Path) -> None:
    members = [item for item in environment() if item[0].path != "."]
    image = tmp_path / "image.tar.zst"
    image.write_bytes(pack(members))
    target = tmp_path / "tree"
    target.mkdir()
    script = 'set -e; zstd -t -q "$1"; zstd -dc "$1" | tar -x -p --delay-directory-restore -C "$2"'
    subprocess.run(["sh", "-c", script, "sh", image, target], check=True)
    found = snapshot(target)
    del found["."]
    assert found == expected(members)


def test_modes_do_not_depend_on_umask_and_lose_their_special_bits(tmp_path: Path) -> None:
    members = [
        directory("."),
        directory("d", 0o3777),
        file("d/suid", b"x", 0o4755),
        file("d/sgid", b"x", 0o2777),
        file("large", noise(3 * SMALL), 0o7666),
    ]
    old = os.umask(0o077)
    try:
        unpack(pack(members), tmp_path / "tree")
    finally:
        os.umask(old)
    modes = {path: entry[1] for path, entry in snapshot(tmp_path / "tree").items()}
    assert modes == {".": 0o700, "d": 0o777, "d/suid": 0o755, "d/sgid": 0o777, "large": 0o666}


def test_the_destination_is_private_below_a_set_group_id_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o2755)
    unpack(pack([directory(".", 0o777), directory("d", 0o755)]), tmp_path / "tree")
    assert stat.S_IMODE((tmp_path / "tree").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "tree/d").stat().st_mode) == 0o755


def test_progress_tells_the_bytes_read(tmp_path: Path) -> None:
    image = pack(environment())
    told: list[int] = []
    unpack(image, tmp_path / "tree", progress=told.append)
    assert min(told) > 0
    assert sum(told) == len(image)
    assert len(told) > 10


# The bytes of the format, as docs/formats/tar-zst.md has them ----------------------------------

Piece = tuple[int, int, int, bytes]


def index_of(image: bytes) -> tuple[list[tuple[int, int]], list[Piece]]:
    checksum, size, magic = struct.unpack("<II8s", image[-16:])
    start = len(image) - size
    assert magic == b"stgindx1"
    assert struct.unpack("<II", image[start - 8 : start]) == (0x184D2A5E, size)
    assert zlib.crc32(image[start:-16]) == checksum
    frame_count, piece_count = struct.unpack("<II", image[-24:-16])
    frames = list(struct.iter_unpack("<II", image[start : start + 8 * frame_count]))
    pos = start + 8 * frame_count
    pieces = []
    for _ in range(piece_count):
        frame, offset, length, path = struct.unpack("<IQQH", image[pos : pos + 22])
        pos += 22 + path
        pieces.append((frame, offset, length, image[pos - path : pos]))
    assert pos == len(image) - 24
    return frames, pieces


def frames_of(image: bytes) -> list[bytes]:
    frames, start = [], 0
    for compressed, _ in index_of(image)[0]:
        frames.append(image[start : start + compressed])
        start += compressed
    return frames


def make_index(frames: list[tuple[int, int]], pieces: list[Piece]) -> bytes:
    body = b"".join(struct.pack("<II", *sizes) for sizes in frames)
    for *fields, path in pieces:
        body += struct.pack("<IQQH", *fields, len(path)) + path
    body += struct.pack("<II", len(frames), len(pieces))
    foot = struct.pack("<II8s", zlib.crc32(body), len(body) + 16, b"stgindx1")
    return struct.pack("<II", 0x184D2A5E, len(body) + 16) + body + foot


def compress(data: bytes, **options: bool) -> bytes:
    options = {"write_checksum": True, "write_content_size": True, **options}
    return zstandard.ZstdCompressor(**options).compress(data)


def image_of(streams: list[bytes], pieces: list[Piece] | None = None) -> bytes:
    """An image whose frames hold anything at all; the end of the archive is added."""
    streams = [*streams, tarstream.TRAILER]
    frames = [compress(data) for data in streams]
    sizes = [(len(frame), len(data)) for frame, data in zip(frames, streams)]
    return b"".join(frames) + make_index(sizes, pieces or [])


def tar(*members: tuple[Member, bytes]) -> bytes:
    return b"".join(header(member) + data + padding(len(data)) for member, data in members)


def test_every_frame_can_be_extracted_alone() -> None:
    members = environment()
    image = pack(members)
    frames, pieces = index_of(image)
    contents = {os.fsencode(member.path): data for member, data in members}
    piece_at = {piece[0]: piece for piece in pieces}
    seen: dict[bytes, int] = {}
    for number, frame in enumerate(frames_of(image)):
        told = zstandard.get_frame_parameters(frame)
        assert told.has_checksum
        assert told.content_size == frames[number][1] <= SMALL + 511
        data = zstandard.ZstdDecompressor().decompress(frame)
        if number in piece_at:
            _, offset, size, path = piece_at[number]
            part = data[: size - offset]
            assert contents[path][offset : offset + len(part)] == part
            assert not data[len(part) :].strip(b"\0")
            seen[path] += len(part)
        elif number == len(frames) - 1:
            assert data == bytes(1024)
        else:
            reader = tarstream.Reader()
            for member, part in reader.feed(data):
                seen[os.fsencode(member.path)] = len(part)
    assert seen == {path: len(data) for path, data in contents.items()}
    assert {path for *_, path in pieces} == {
        os.fsencode(member.path)
        for member, data in members
        if len(header(member)) + len(data) > SMALL
    }


def test_the_tests_can_make_images(tmp_path: Path) -> None:
    """Else all that follows would be refused for the wrong reason."""
    large = file("large", noise(1200))
    raw = tar(large)
    image = image_of(
        [tar(directory("."), file("a", b"1")), raw[:1000], raw[1000:1500], raw[1500:]],
        [(2, 488, 1200, b"large"), (3, 988, 1200, b"large")],
    )
    unpack(image, tmp_path / "tree")
    assert (tmp_path / "tree/large").read_bytes() == large[1]


# Hostile members ------------------------------------------------------------------------------


def raw_path(path: bytes, kind: str = "file", target: bytes = b"") -> bytes:
    """A member that our writer would refuse to write."""
    return tarstream._render(path, kind, 0o755, MTIME, 0, target)


def special(flag: bytes) -> bytes:
    raw = bytearray(tar(file("special")))
    raw[156:157] = flag
    raw[329:345] = b"0000001\0" + b"0000003\0"  # /dev/null
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


ROOT = directory(".")
HOSTILE = {
    "traversal": [raw_path(b"../escaped")],
    "traversal within": [raw_path(b"a/../../escaped")],
    "absolute": [raw_path(b"/tmp/escaped")],
    "empty component": [raw_path(b"a//b")],
    "root as file": [raw_path(b".")],
    "too deep": [raw_path(b"/".join([b"d"] * 200), "dir")],
    "traversal of a directory": [raw_path(b"../escaped", "dir")],
    "traversal of a link": [raw_path(b"../escaped", "symlink", b"x")],
    "hard link outside": [raw_path(b"link", "hardlink", b"../../etc/passwd")],
    "hard link to an absolute path": [raw_path(b"link", "hardlink", b"/etc/passwd")],
    "character device": [special(b"3")],
    "block device": [special(b"4")],
    "fifo": [special(b"6")],
    "symbolic link, then a file through it": [
        tar(ROOT, symlink("out", "/tmp"), file("out/escaped", b"x"))
    ],
    "link inside, then a file through it": [
        tar(ROOT, directory("in"), symlink("alias", "in"), file("alias/f", b"x"))
    ],
    "a file, then a link in place of its directory": [
        tar(ROOT, directory("d"), file("d/f", b"x"), symlink("d", "/tmp"))
    ],
    "a link, then a directory in its place": [
        tar(ROOT, symlink("d", "/tmp")), tar(directory("d"), file("d/f", b"x"))
    ],
    "a link, then a file in its place": [tar(ROOT, symlink("f", "/tmp/escaped"), file("f", b"x"))],
    "a file, then a link in its place": [tar(ROOT, file("f", b"x")), tar(symlink("f", "g"))],
    "a link twice": [tar(ROOT, symlink("l", "a"), symlink("l", "b"))],
    "a file twice": [tar(ROOT, file("f", b"1"), file("f", b"2"))],
    "a file twice in two frames": [tar(ROOT, file("f", b"1")), tar(file("f", b"2"))],
    "a directory twice": [tar(ROOT, directory("d"), directory("d", 0o700))],
    "the root twice": [tar(ROOT, ROOT)],
    "a directory, then a file": [tar(ROOT, directory("d"), file("d"))],
    "a file, then a directory": [tar(ROOT, file("d"), directory("d"))],
    "a file within a file": [tar(ROOT, file("f", b"x"), file("f/g", b"x"))],
    "a directory nobody listed": [tar(ROOT, file("d/f", b"x"))],
    "a link in a directory nobody listed": [tar(ROOT, symlink("d/l", "x"))],
    "a hard link twice": [tar(ROOT, file("f"), hardlink("l", "f"), hardlink("l", "f"))],
    "a hard link to nothing": [tar(ROOT, hardlink("l", "nothing"))],
    "a hard link to a directory": [tar(ROOT, directory("d"), hardlink("l", "d"))],
    "a hard link to a symbolic link": [tar(ROOT, symlink("s", "/etc/passwd"), hardlink("l", "s"))],
    "a hard link through a symbolic link": [
        tar(ROOT, symlink("s", "/etc"), hardlink("l", "s/passwd"))
    ],
    "a hard link through a file": [tar(ROOT, file("f"), hardlink("l", "f/g"))],
    "a hard link to a later link": [tar(ROOT, file("f"), hardlink("a", "b"), hardlink("b", "f"))],
    "an absolute link": [tar(ROOT, symlink("l", "/etc/passwd"))],
    "a link that goes up too far": [tar(ROOT, directory("d"), symlink("d/l", "../../x"))],
    "a link that goes up behind a link": [
        tar(ROOT, directory("d"), symlink("d/up", ".."), symlink("x", "d/up/../etc"))
    ],
    "data behind the end": [tar(ROOT) + tarstream.TRAILER + tar(file("f"))],
    "an end before the end": [tar(ROOT), tarstream.TRAILER, tar(file("f"))],
    "half a header": [tar(ROOT)[:300]],
    "half a member": [tar(ROOT, file("f", b"x" * 600))[:1100]],
    "a member without its padding": [tar(ROOT, file("f", b"x" * 600))[:-100]],
    "rubbish": [b"rubbish" * 1000],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(name: str, tmp_path: Path) -> None:
    place = tmp_path / "outside" / "inside"
    place.mkdir(parents=True)
    refused(image_of(HOSTILE[name]), place)
    assert os.listdir(place) == ["image.tar.zst"]
    assert os.listdir(tmp_path / "outside") == ["inside"]
    assert not os.path.lexists("/tmp/escaped")


@pytest.mark.parametrize("workers", [1, 4])
def test_a_link_swapped_for_a_directory_catches_nothing(workers: int, tmp_path: Path) -> None:
    """Many files in a directory that is also a link outwards, in frames of their own."""
    trap = tmp_path / "trap"
    trap.mkdir()
    streams = [tar(ROOT, symlink("d", str(trap)))]
    streams += [tar(file(f"d/{number}", b"x")) for number in range(50)]
    streams += [tar(directory("d"))]
    refused(image_of(streams), tmp_path, workers=workers, allowed_links=lambda path, target: True)
    assert os.listdir(trap) == []


def test_links_out_of_the_tree_are_made_only_if_allowed(tmp_path: Path) -> None:
    members = [
        ROOT,
        directory("bin"),
        symlink("bin/python", "/usr/bin/python3"),
        symlink("in", "bin"),
    ]
    asked = []

    def allow(path: str, target: str) -> bool:
        asked.append((path, target))
        return target.startswith("/usr/")

    unpack(pack(members), tmp_path / "tree", allowed_links=allow)
    assert asked == [("bin/python", "/usr/bin/python3")]
    assert os.readlink(tmp_path / "tree/bin/python") == "/usr/bin/python3"
    error = refused(pack([ROOT, symlink("l", "/etc")]), tmp_path / "tree", allowed_links=allow)
    assert "'l'" in error.message


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "tree"
    target.mkdir()
    (target / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    image = tmp_path / "image"
    image.write_bytes(pack([ROOT]))
    for path in (target, target / "mine", tmp_path / "link"):
        with pytest.raises(UsageError) as error:
            unpack(image, path)
        assert error.value.hint
    assert os.listdir(target) == ["mine"]


def test_a_source_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(UsageError):
            unpack(path, tmp_path / "tree")
    with pytest.raises(NotFoundError) as error:
        unpack(tmp_path / "missing", tmp_path / "tree")
    assert error.value.hint
    assert not (tmp_path / "tree").exists()


# Damage ---------------------------------------------------------------------------------------


def test_truncation_is_noticed(tmp_path: Path) -> None:
    image = pack(environment())
    ends = [0, 1, 15, 16, len(image) - 1, len(image) - 16, len(image) - 17]
    ends += [len(image) * part // 10 for part in range(1, 10)]
    for end in ends:
        refused(image[:end], tmp_path)


def test_a_changed_byte_never_changes_the_tree(tmp_path: Path) -> None:
    """Without a CRC-32 to compare with. A few bits of zstd's format mean nothing; all others do."""
    members = [ROOT, file("a", noise(500)), file("text", b"text " * 2000), file("b", noise(40_000))]
    image = pack(members)
    start, places = 0, set(range(len(image) - 150, len(image)))  # all of the index
    for compressed, _ in index_of(image)[0]:
        places |= {start + offset for offset in range(min(12, compressed))}
        places |= {start + compressed // 2, start + compressed - 2}
        start += compressed
    unnoticed = 0
    for place in sorted(places):
        damaged = bytearray(image)
        damaged[place] ^= 0x10
        try:
            unpack(bytes(damaged), tmp_path / "tree", workers=1)
        except IntegrityError:
            assert not os.path.lexists(tmp_path / "tree")
            continue
        unnoticed += 1
        assert snapshot(tmp_path / "tree") == expected(members)
        shutil.rmtree(tmp_path / "tree")
    # The unused bit in the header of each frame.
    assert unnoticed <= len(frames_of(image))


def test_the_checksum_is_compared_with_what_is_expected(tmp_path: Path) -> None:
    image = pack(environment())
    total = zlib.crc32(image)
    unpack(image, tmp_path / "tree", crc32=total)
    (tmp_path / "bad").mkdir()
    for wrong in (0, total ^ 1):
        error = refused(image, tmp_path / "bad", crc32=wrong)
        assert f"{total:08x}" in error.message
        assert f"{wrong:08x}" in error.message
        assert error.hint


def test_an_image_that_is_overwritten_while_it_is_read(tmp_path: Path) -> None:
    """What is compared is what was extracted, not what the file has become."""
    image = pack(environment())
    path = tmp_path / "image"
    path.write_bytes(image)

    first = index_of(image)[0][0][0]

    def overwrite(done: int) -> None:
        with path.open("r+b") as file:
            file.seek(first)
            file.write(bytes(len(image) - first))

    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "tree", progress=overwrite)

    def cut(done: int) -> None:
        os.truncate(path, first)

    path.write_bytes(image)
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "tree", progress=cut)
    assert os.listdir(tmp_path) == ["image"]


def changed_index(
    change: Callable[[list[Any], list[Any]], object], tmp_path: Path
) -> tuple[bytes, bytes]:
    """An image, and the same with an index that is whole but wrong."""
    large = [file("large", noise(4 * SMALL)), file("other", noise(2 * SMALL)), file("z", b"z")]
    image = pack([ROOT, file("a", b"1" * 100), *large])
    frames, pieces = index_of(image)
    data = b"".join(frames_of(image))
    change(frames, pieces)
    return image, data + make_index(frames, pieces)


def put(items: list[Any], place: int, **fields: Any) -> None:
    names = ("frame", "offset", "size", "path") if len(items[0]) == 4 else ("compressed", "size")
    items[place] = tuple(fields.get(name, old) for name, old in zip(names, items[place]))


WRONG_INDEXES: dict[str, Callable[[list[Any], list[Any]], object]] = {
    "no frames": lambda f, p: f.clear(),
    "one frame too few": lambda f, p: f.pop(),
    "one frame too many": lambda f, p: f.append((20, 1024)),
    "an empty frame": lambda f, p: f.insert(1, (0, 0)),
    "two frames exchanged": lambda f, p: f.insert(0, f.pop(1)),
    "a frame that is too small": lambda f, p: put(f, 0, size=512),
    "a frame that is too large": lambda f, p: put(f, 0, size=4096),
    "a frame of 4 GiB": lambda f, p: put(f, 0, size=2**32 - 1),
    "a border between frames": lambda f, p: (
        put(f, 0, compressed=f[0][0] + 1),
        put(f, 1, compressed=f[1][0] - 1),
    ),
    "two frames as one": lambda f, p: f.insert(0, (f[0][0] + f[1][0], f.pop(0)[1] + f.pop(0)[1])),
    "no pieces": lambda f, p: p.clear(),
    "a piece missing at the end": lambda f, p: p.pop(),
    "a piece missing at the start": lambda f, p: p.pop(0),
    "a piece missing in the middle": lambda f, p: p.pop(1),
    "a member's pieces missing": lambda f, p: [
        p.pop() for piece in list(p) if piece[3] == b"other"
    ],
    "a piece twice": lambda f, p: p.append(p[-1]),
    "pieces out of order": lambda f, p: p.reverse(),
    "a piece of another member": lambda f, p: put(p, 0, path=b"other"),
    "all pieces of another name": lambda f, p: [
        put(p, at, path=b"elsewhere") for at, piece in enumerate(p) if piece[3] == b"large"
    ],
    "all pieces of a small file": lambda f, p: [
        put(p, at, path=b"a") for at, piece in enumerate(p) if piece[3] == b"large"
    ],
    "pieces of a file and of one within": lambda f, p: [
        put(p, at, path=b"large/within") for at, piece in enumerate(p) if piece[3] == b"other"
    ],
    "pieces that lead out": lambda f, p: [
        put(p, at, path=b"../large") for at, piece in enumerate(p) if piece[3] == b"large"
    ],
    "a piece of an absolute path": lambda f, p: put(p, -1, path=b"/tmp/escaped"),
    "a piece of the root": lambda f, p: put(p, -1, path=b"."),
    "a frame that does not exist": lambda f, p: put(p, -1, frame=len(f)),
    "the first frame as a piece": lambda f, p: p.insert(0, (0, 512, 1024, b"first")),
    "the end of the archive as a piece": lambda f, p: p.append((len(f) - 1, 512, 1536, b"end")),
    "an offset too far": lambda f, p: put(p, -1, offset=p[-1][1] + 1),
    "an offset before the start": lambda f, p: put(p, 0, offset=0),
    "a piece beyond the member": lambda f, p: put(p, -1, offset=2**63),
    "another size of the member": lambda f, p: [
        put(p, at, size=piece[2] + 1) for at, piece in enumerate(p)
    ],
    "all offsets moved": lambda f, p: [
        put(p, at, offset=piece[1] + 512, size=piece[2] + 512) for at, piece in enumerate(p)
    ],
}


@pytest.mark.parametrize("name", WRONG_INDEXES)
def test_a_wrong_index_is_refused(name: str, tmp_path: Path) -> None:
    good, bad = changed_index(WRONG_INDEXES[name], tmp_path)
    assert good != bad
    refused(bad, tmp_path)


def test_the_index_must_be_there_and_whole(tmp_path: Path) -> None:
    image = pack([ROOT, file("a", b"1")])
    frames, pieces = index_of(image)
    data, index = b"".join(frames_of(image)), make_index(frames, pieces)
    assert data + index == image
    body = index[8:-16]

    def foot(body: bytes, size: int) -> bytes:
        return struct.pack("<II8s", zlib.crc32(body), size, b"stgindx1")

    wrong = {
        "missing": data,
        "only the index": index,
        "something behind it": image + b"\0",
        "two of them": image + index,
        "no skippable frame": data + b"\x28\xb5\x2f\xfd" + index[4:],
        "one byte more in the frame's size": data + index[:4] + b"\1" + index[5:],
        "too small": data + struct.pack("<II", 0x184D2A5E, 20) + b"1234" + foot(b"1234", 20),
        "larger than the image": data + index[:8] + body + foot(body, 2**31),
        "larger than we read": data + index[:8] + body + foot(body, 2**32 - 1),
        "counts too high": data
        + struct.pack("<II", 0x184D2A5E, len(body) + 16)
        + (high := body[:-8] + b"\xff" * 8)
        + foot(high, len(high) + 16),
        "pieces too many": data
        + struct.pack("<II", 0x184D2A5E, len(body) + 16)
        + (more := body[:-4] + b"\1\0\0\0")
        + foot(more, len(more) + 16),
        "an empty file": b"",
    }
    for name, bad in wrong.items():
        error = refused(bad, tmp_path)
        assert error.hint, name


def test_frames_must_be_what_the_format_says(tmp_path: Path) -> None:
    data = tar(ROOT, file("zeros", bytes(100_000)))
    streaming = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    open_ended = streaming.compress(data) + streaming.flush()
    dictionary = zstandard.ZstdCompressionDict(data[:2048] * 8)
    with_dictionary = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True)
    end = compress(tarstream.TRAILER)
    window = bytearray(compress(data))
    assert window[4] & 0x20  # one segment: there is no window descriptor, the next is the size
    window[4] ^= 0x20
    window.insert(5, 17 << 3)  # 2 ** (10 + 17) bytes
    assert zstandard.get_frame_parameters(bytes(window)).window_size == 1 << 27
    wrong = {
        "no checksum": compress(data, write_checksum=False),
        "no content size": compress(data, write_content_size=False),
        "unknown size and window": open_ended,
        "a dictionary": with_dictionary.compress(data),
        "a window of 128 MiB": bytes(window),
        "a skippable frame": struct.pack("<II", 0x184D2A50, len(data)) + data,
        "two frames": compress(data[:512]) + compress(data[512:]),
        "rubbish behind the frame": compress(data) + b"rubbish",
        "no zstd": data,
        "shorter than a header": b"\x28\xb5\x2f\xfd\0",
    }
    good = compress(data)
    unpack(
        good + end + make_index([(len(good), len(data)), (len(end), 1024)], []), tmp_path / "tree"
    )
    (tmp_path / "bad").mkdir()
    for frame in wrong.values():
        sizes = [(len(frame), len(data)), (len(end), 1024)]
        refused(frame + end + make_index(sizes, []), tmp_path / "bad")


# Bombs ----------------------------------------------------------------------------------------


def test_more_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    members = [ROOT, directory("d"), *(file(f"d/{number}", b"x" * 100) for number in range(200))]
    image = pack(members)
    unpack(image, tmp_path / "tree", max_files=202, max_bytes=20_000)
    (tmp_path / "bad").mkdir()
    refused(image, tmp_path / "bad", max_files=201, max_bytes=20_000)
    refused(image, tmp_path / "bad", max_files=202, max_bytes=19_999)
    refused(image_of([tar(*members)]), tmp_path / "bad", max_files=1, max_bytes=10)


def test_pieces_that_no_other_rule_would_catch(tmp_path: Path) -> None:
    raw = tar(file("large", noise(1200)))
    twice = [(1, 488, 1200, b"large"), (2, 488, 1200, b"large")]
    refused(image_of([raw[:1000], raw[1000:], raw[1000:]], twice), tmp_path)
    refused(image_of([raw[:1000], raw[1000:-1] + b"x"], twice[:1]), tmp_path)
    zeros = tar(file("zeros", bytes(1536)))
    refused(image_of([zeros[:1024]], [(1, 512, 1536, b"zeros")]), tmp_path)
    other = tar(file("other", noise(1200)))
    pieces = [(1, 488, 1200, b"large"), (3, 488, 1200, b"other")]
    streams = [raw[:1000], raw[1000:], other[:1000], other[1000:]]
    refused(image_of(streams, pieces[::-1]), tmp_path)
    unpack(image_of(streams, pieces), tmp_path / "tree")


def test_a_bomb_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError("made something")

    image = pack(
        [ROOT, *(file(f"zeros {n}", bytes(1 << 20)) for n in range(20))], frame_size=1 << 21
    )
    assert len(image) < 10_000
    monkeypatch.setattr(os, "mkdir", no)
    monkeypatch.setattr(os, "fork", no)
    refused(image, tmp_path, max_files=21, max_bytes=10 << 20)


def test_a_frame_larger_than_the_index_says_is_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Decompressor:
        def __init__(self, **_: object) -> None:
            pass

        def decompress(self, *_: object, **__: object) -> bytes:
            raise AssertionError("decompressed")

    bomb, end = compress(bytes(100 << 20)), compress(tarstream.TRAILER)
    image = bomb + end + make_index([(len(bomb), 1 << 20), (len(end), 1024)], [])
    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    assert "not what the index says" in refused(image, tmp_path, workers=1).message


def test_a_huge_member_is_refused(tmp_path: Path) -> None:
    head = header(Member("huge", "file", 0o644, MTIME, 1 << 50))
    refused(image_of([tar(ROOT) + head]), tmp_path)
    refused(image_of([tar(ROOT) + head, b"x" * 512], [(1, 512, 1 << 50, b"huge")]), tmp_path)


# The machine fails ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB and 64 inodes."""
    place = tmp_path / "small"
    place.mkdir()
    options = "size=1m,nr_inodes=64,mode=0755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
@pytest.mark.parametrize(
    "members",
    [
        pytest.param([ROOT, file("large", noise(3 << 20))], id="one large file"),
        pytest.param([ROOT, *(file(f"{n}", noise(60_000)) for n in range(30))], id="many files"),
        pytest.param([ROOT, *(file(f"{n}") for n in range(100))], id="files without bytes"),
        pytest.param([ROOT, *(directory(f"{n}") for n in range(100))], id="directories"),
        pytest.param([ROOT, *(symlink(f"{n}", "x") for n in range(100))], id="links"),
    ],
)
def test_a_full_disk(members: Members, tmp_path: Path, small_disk: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pack(members))
    with pytest.raises(NoSpaceError) as error:
        unpack(image, small_disk / "tree")
    assert error.value.hint
    assert str(small_disk) in error.value.message
    assert os.listdir(small_disk) == []


@pytest.mark.root
def test_a_full_disk_while_writing_the_image(small_disk: Path) -> None:
    with (small_disk / "image").open("wb", buffering=0) as sink:
        writer = Writer(sink, frame_size=SMALL)
        with pytest.raises(NoSpaceError):
            writer.write_member(*file("large", noise(3 << 20)))
        writer.abort()


@pytest.mark.root
def test_a_read_only_disk(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (tmp_path / "image").write_bytes(pack([ROOT]))
    with pytest.raises(DeniedError) as error:
        unpack(tmp_path / "image", small_disk / "tree")
    assert error.value.hint


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Callable[[Callable[[], None]], int]]:
    """Runs something as another user, in a process and a current directory of its own."""
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, 65534, 65534)

        def run(what: Callable[[], None]) -> int:
            pid = os.fork()
            if pid == 0:
                try:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                    os.chdir(place)
                    what()
                    os._exit(0)
                except StagerError as error:
                    os._exit(error.exit_code)
                finally:
                    os._exit(99)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        yield run


@pytest.mark.root
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_user_gets_trees_that_nobody_may_enter(
    foreign: Callable[[Callable[[], None]], int],
) -> None:
    """Root may do anything; others must create what is in a directory before they close it."""
    members = [
        directory(".", 0o755),
        directory("none", 0),
        directory("none/read-only", 0o555),
        file("none/read-only/f", b"f", 0o400),
        file("none/large", noise(3 * SMALL), 0o400),
        hardlink("none/same", "none/read-only/f"),
        symlink("none/link", "large"),
    ]
    image = pack(members)

    def check() -> None:
        unpack(image, Path("tree").absolute())
        Path("tree/none").chmod(0o700)
        found = snapshot(Path("tree"))
        assert found == {**expected(members), "none": ("dir", 0o700, MTIME, b"")}
        Path("tree/none/read-only").chmod(0o700)
        shutil.rmtree("tree")

    assert foreign(check) == 0


@pytest.mark.root
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_users_directory(foreign: Callable[[Callable[[], None]], int]) -> None:
    image = pack([ROOT])

    def check() -> None:
        Path("image").write_bytes(image)
        unpack(Path("image"), Path("/stager-of-nobody"))

    assert foreign(check) == DeniedError.exit_code


def test_a_path_that_is_a_file_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "image").write_bytes(pack([ROOT]))
    with pytest.raises(StagerError):
        unpack(tmp_path / "image", tmp_path / "file" / "tree")


def many_files() -> bytes:
    """One file to a frame."""
    return pack([ROOT, *(file(f"{n}", noise(9000, n)) for n in range(60))])


def in_workers(monkeypatch: pytest.MonkeyPatch, happen: Callable[[str], object]) -> None:
    """Have workers call something with the path of every file, before they create it."""
    create = extracting._Unpacker._create

    def spoiled(self: extracting._Unpacker, member: Member, *more: Any) -> None:
        happen(member.path)
        create(self, member, *more)

    monkeypatch.setattr(extracting._Unpacker, "_create", spoiled)


def test_a_killed_worker_fails_the_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: str) -> None:
        if path == "30":
            os.kill(os.getpid(), signal.SIGKILL)

    in_workers(monkeypatch, die)
    error = refused(many_files(), tmp_path, StagerError, workers=3)
    assert "signal 9" in error.message
    assert error.hint


def test_all_workers_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_workers(monkeypatch, lambda path: os._exit(7))
    error = refused(many_files(), tmp_path, StagerError)
    assert "status 7" in error.message


def test_a_worker_that_raises_fails_the_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        if path == "30":
            raise ValueError("no such table")

    def refuse(path: str) -> None:
        raise DeniedError("not this one", hint="try another", blame="node")

    image = many_files()
    with monkeypatch.context() as patch:
        in_workers(patch, fail)
        error = refused(image, tmp_path, StagerError, workers=3)
    assert "ValueError: no such table" in error.message
    in_workers(monkeypatch, refuse)
    error = refused(image, tmp_path, DeniedError, workers=3)
    assert (error.message, error.hint, error.blame) == ("not this one", "try another", "node")


def test_busy_workers_are_not_waited_for_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linger(path: str) -> None:
        if path == "0":
            wait_for(tmp_path / "busy")
            raise ValueError
        (tmp_path / "busy").touch()
        wait_for(tmp_path / "never", limit=20)
        (tmp_path / "waited").touch()

    in_workers(monkeypatch, linger)
    refused(many_files(), tmp_path, StagerError)
    assert (tmp_path / "busy").exists()
    assert not (tmp_path / "waited").exists()


def wait_for(path: Path, limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def test_an_interrupted_parent_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(many_files(), tmp_path / "tree", progress=interrupt)
    assert not (tmp_path / "tree").exists()


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forks = iter([os.fork])

    def fork() -> int:
        for real in forks:
            return real()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    assert "worker" in refused(many_files(), tmp_path, StagerError).message


PARENT = """
import os, sys, time, zlib
from stager.formats.tarzst import extract, extracting

create = extracting._Unpacker._create

def report(*arguments):
    # A worker: tell the test, then wait until it has killed our parent.
    os.write(1, b"%d\\n" % os.getpid())
    limit = time.monotonic() + 60
    while not os.path.exists(sys.argv[3]) and time.monotonic() < limit:
        time.sleep(0.01)
    create(*arguments)

extracting._Unpacker._create = report
with open(sys.argv[1], "rb") as file:
    crc32 = zlib.crc32(file.read())
limits = dict(max_files=1000, max_bytes=1 << 30, crc32=crc32, allowed_links=None)
extract(sys.argv[1], sys.argv[2], workers=2, **limits)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(many_files())
    arguments = [tmp_path / "image", tmp_path / "tree", tmp_path / "go on"]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(2)}
        assert len(workers) == 2
        parent.kill()
        parent.wait()
        (tmp_path / "go on").touch()
        # The pipe ends when the last worker has ended.
        rest = parent.stdout.read()
    # Each finishes the frame at hand (one file), reports to nobody, and ends.
    assert rest == b""
    assert not any(os.path.exists(f"/proc/{pid}/fd/1") for pid in workers)


# The writer -----------------------------------------------------------------------------------


def test_memory_is_bounded() -> None:
    """The writer takes no more data while frames wait to be written."""
    threads = 3
    written = 0
    most = 0

    class Sink(io.RawIOBase):
        def write(self, data: Any) -> int:
            nonlocal written
            written += 1
            return len(data)

    def pieces() -> Iterator[bytes]:
        nonlocal most
        for number in range(100):
            most = max(most, number - written)
            yield noise(SMALL, number)

    with Writer(Sink(), threads=threads, frame_size=SMALL) as writer:  # type: ignore[arg-type]
        writer.write_member(Member("large", "file", 0o644, MTIME, 100 * SMALL), pieces())
    assert 0 < most <= threads + 2


@pytest.mark.parametrize("size", [0, 99, 101, 5 * SMALL])
def test_a_file_that_changed_is_an_error(size: int) -> None:
    for data in (b"x" * 100, iter([b"x" * 50, b"x" * 50])):
        writer = Writer(io.BytesIO(), frame_size=SMALL)
        with pytest.raises(IntegrityError) as error:
            writer.write_member(Member("a\nb", "file", 0o644, MTIME, size), data)
        writer.abort()
        assert "'a\\nb'" in error.value.message
        assert error.value.hint


def test_an_image_given_up_cannot_be_extracted(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with pytest.raises(RuntimeError), Writer(sink, frame_size=SMALL) as writer:
        for member, data in environment():
            writer.write_member(member, data)
        raise RuntimeError
    refused(sink.getvalue(), tmp_path)


@pytest.mark.parametrize("frame_size", [0, SMALL - 1, (64 << 20) + 1])
def test_frame_sizes_out_of_range(frame_size: int) -> None:
    with pytest.raises(ValueError, match="frame_size"):
        Writer(io.BytesIO(), frame_size=frame_size)


def test_the_largest_frame_can_be_extracted(tmp_path: Path) -> None:
    size = (64 << 20) - 512 + 1  # one byte less than two frames, with its padding
    member = Member("zeros", "file", 0o644, MTIME, size)
    path = tmp_path / "image"
    with path.open("wb") as sink, Writer(sink, frame_size=64 << 20, threads=1) as writer:
        writer.write_member(*ROOT)
        writer.write_member(member, bytes(size))
    unpack(path, tmp_path / "tree", workers=1)
    assert (tmp_path / "tree/zeros").stat().st_size == size


def test_reports_survive_any_name(tmp_path: Path) -> None:
    """Workers report in JSON lines; a name must neither break a line nor get lost."""
    name = os.fsdecode(b'\xff\n"\\\x01' + "ü".encode())
    members = [ROOT, directory(name), symlink(f"{name}/{name}", name)]
    members += [file(f"{name}/large", noise(3 * SMALL))]
    unpack(pack(members), tmp_path / "tree")
    assert snapshot(tmp_path / "tree") == expected(members)
