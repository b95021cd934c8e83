"""The tar dialect: read alike by every program, and refused by our reader if it is any other."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager.errors import IntegrityError, UsageError
from stager.formats import tarstream
from stager.formats.tarstream import Member, Reader, header, padding, stays_inside

MTIME = 1_700_000_000
LONG = "/".join(["directory" * 9] * 12) + "/file"  # 987 bytes, 13 components


def file(path: str, content: bytes = b"", mode: int = 0o644, mtime: int = MTIME) -> Member:
    return Member(path, "file", mode, mtime, len(content))


def directory(path: str, mode: int = 0o755) -> Member:
    return Member(path, "dir", mode, MTIME)


def parents(path: str) -> list[Member]:
    parts = path.split("/")
    return [directory("/".join(parts[:count])) for count in range(1, len(parts))]


def stream(members: list[tuple[Member, bytes]]) -> bytes:
    parts = [header(member) + data + padding(len(data)) for member, data in members]
    return b"".join(parts) + tarstream.TRAILER


def awkward() -> list[tuple[Member, bytes]]:
    """Everything that tar programs have ever disagreed on."""
    names = {
        "plain.py": b"import os\n",
        "empty": b"",
        "block": b"x" * 512,
        "more than a block": b"y" * 1025,
        "line\nbreak": b"a newline in the name",
        os.fsdecode(b"not-\xff\xfe-text"): b"bytes that are no UTF-8",
        "ünïcödé": b"UTF-8",
        "-rf": b"looks like an option",
        "back\\slash": b"no separator",
        " blanks ": b"at both ends",
        "*?[a]": b"no pattern",
    }
    names.update({"n" * length: b"%d" % length for length in (99, 100, 101, 154, 155, 156, 255)})
    # The same lengths with a directory in front: where ustar would split a name in two.
    names.update({"dir/" + "m" * length: b"%d" % length for length in (95, 96, 97, 150, 151, 252)})
    members = [(directory(".", 0o750), b"")]
    members += [(directory("dir", 0o711), b""), (directory("empty dir"), b"")]
    for length in (98, 99, 100, 101):  # a directory's slash counts
        members.append((directory("d" * length), b""))
    members += [(parent, b"") for parent in parents(LONG)]
    names[LONG] = b"deep"
    members += [(file(name, data), data) for name, data in names.items()]
    members += [
        (file("read-only", b"r", mode=0o444), b"r"),
        (file("program", b"#!", mode=0o755), b"#!"),
        (file("nobody", b"0", mode=0), b"0"),
        (file("epoch", b"old", mtime=0), b"old"),
        (file("2106", b"new", mtime=2**32 - 1), b"new"),
        (Member("link", "symlink", 0o777, MTIME, target="plain.py"), b""),
        (Member("dangling", "symlink", 0o777, MTIME, target="/no/such/file"), b""),
        (Member("odd", "symlink", 0o777, MTIME, target=os.fsdecode(b"not-\xff\xfe-text")), b""),
        (Member("same", "hardlink", 0o644, MTIME, target="plain.py"), b""),
        (Member("long same", "hardlink", 0o644, MTIME, target=LONG), b""),
        (Member("s" * 150, "symlink", 0o777, MTIME, target="t" * 300), b""),
    ]
    members += [
        (Member(f"to {length}", "symlink", 0o777, MTIME, target="t" * length), b"")
        for length in (99, 100, 101, 4000)
    ]
    return members


Tree = dict[str, tuple[object, ...]]


def expected(members: list[tuple[Member, bytes]]) -> Tree:
    contents = {member.path: (member, data) for member, data in members}
    found: Tree = {}
    for member, data in members:
        if member.kind == "symlink":
            found[member.path] = ("symlink", member.target)
        elif member.kind == "dir":
            found[member.path] = ("dir", member.mode, member.mtime)
        else:
            real, content = contents[member.target] if member.target else (member, data)
            found[member.path] = ("file", real.mode, real.mtime, content)
    return found


def snapshot(root: Path) -> Tree:
    found: Tree = {}
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files, "."]:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            relative = os.path.relpath(path, root)
            if stat.S_ISLNK(info.st_mode):
                found[relative] = ("symlink", os.readlink(path))
            elif stat.S_ISDIR(info.st_mode):
                found[relative] = ("dir", stat.S_IMODE(info.st_mode), int(info.st_mtime))
            else:
                content = Path(path).read_bytes()
                mode = stat.S_IMODE(info.st_mode)
                found[relative] = ("file", mode, int(info.st_mtime), content)
    return found


def run(command: list[str], data: bytes, cwd: Path) -> None:
    done = subprocess.run(command, check=False, input=data, cwd=cwd, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def by_gnu_tar(data: bytes, target: Path) -> None:
    target.mkdir()
    # Without the delay, tar finishes a directory when the archive first turns to another one.
    run(["tar", "-x", "-p", "--delay-directory-restore", "-f", "-"], data, target)


def by_bsdtar(data: bytes, target: Path) -> None:
    target.mkdir()
    run(["bsdtar", "-x", "-p", "-f", "-"], data, target)
    os.utime(target, (MTIME, MTIME))  # libarchive restores the root's mode, but not its time


def by_python(data: bytes, target: Path) -> None:
    target.mkdir()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        # Our own archive; the default differs between versions of Python, and warns in some.
        archive.extraction_filter = lambda member, path: member  # type: ignore
        archive.extractall(target)


def by_mksquashfs(data: bytes, target: Path) -> None:
    image = target.with_suffix(".squashfs")
    options = ["-tar", "-quiet", "-no-progress", "-comp", "zstd"]
    options += ["-root-mode", "0750"]  # it ignores the root's entry
    run(["mksquashfs", "-", str(image), *options], data, target.parent)
    run(["unsquashfs", "-no-progress", "-dest", str(target), str(image)], b"", target.parent)
    os.utime(target, (MTIME, MTIME))


@pytest.mark.parametrize("extract", [by_gnu_tar, by_bsdtar, by_python, by_mksquashfs])
def test_every_program_makes_the_same_tree(
    extract: Callable[[bytes, Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "tree"
    extract(stream(awkward()), target)
    assert snapshot(target) == expected(awkward())
    assert (target / "same").stat().st_ino == (target / "plain.py").stat().st_ino
    assert (target / "long same").stat().st_nlink == 2


def test_python_sees_every_field() -> None:
    with tarfile.open(fileobj=io.BytesIO(stream(awkward()))) as archive:
        infos = archive.getmembers()
    kinds = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "dir"}
    kinds |= {tarfile.SYMTYPE: "symlink", tarfile.LNKTYPE: "hardlink"}
    found = [
        Member(
            info.name.rstrip("/"),
            kinds[info.type],
            info.mode,
            int(info.mtime),
            info.size,
            info.linkname,
        )
        for info in infos
    ]
    assert found == [member for member, _ in awkward()]
    assert {(info.uid, info.gid, info.uname, info.gname) for info in infos} == {(0, 0, "", "")}


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 9 << 30, 1 << 40])
def test_sizes_from_8_gib(size: int, tmp_path: Path) -> None:
    head = header(Member("big", "file", 0o644, MTIME, size))
    assert len(head) == 512
    assert tarfile.TarInfo.frombuf(head, "utf-8", "strict").size == size
    archive = tmp_path / "big.tar"
    with archive.open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(512 + size + len(padding(size)))
        sparse.seek(0, os.SEEK_END)
        sparse.write(tarstream.TRAILER)
    for command in ("tar", "bsdtar"):
        listed = subprocess.check_output([command, "-tvf", archive], text=True)
        assert str(size) in listed.split()
    ((member, piece),) = Reader().feed(head + b"begin")
    assert (member.size, bytes(piece)) == (size, b"begin")


def test_mtimes_are_clamped() -> None:
    for given_time, kept in ((-1, 0), (2**32, 2**32 - 1), (10**12, 2**32 - 1), (1.9, 1)):
        assert (
            tarfile.TarInfo.frombuf(
                header(Member("f", "file", 0o644, given_time, 0)),  # type: ignore[arg-type]
                "utf-8",
                "strict",
            ).mtime
            == kept
        )


def test_padding_fills_the_block() -> None:
    assert [len(padding(size)) for size in (0, 1, 511, 512, 513)] == [0, 511, 1, 0, 511]


# The reader -----------------------------------------------------------------------------------


def read(data: bytes, step: int = 0) -> list[tuple[Member, bytes]]:
    """All members; the archive has to be complete."""
    reader = Reader()
    found: list[tuple[Member, bytearray]] = []
    for start in range(0, len(data), step or len(data)):
        for member, piece in reader.feed(data[start : start + (step or len(data))]):
            if found and found[-1][0] is member:
                found[-1][1].extend(piece)
            else:
                found.append((member, bytearray(piece)))
    assert reader.ended
    assert reader.at_boundary
    return [(member, bytes(content)) for member, content in found]


@pytest.mark.parametrize("step", [0, 1, 511, 512, 513, 5000])
def test_reads_what_was_written_in_pieces_of_any_size(step: int) -> None:
    assert read(stream(awkward()), step) == awkward()


_COMPONENT = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {b"/"[0], 0}.intersection(name) and name not in (b".", b"..")
)
_PATH = st.lists(_COMPONENT, min_size=1, max_size=5).map(
    lambda parts: os.fsdecode(b"/".join(parts))
)
_TARGET = (
    st.binary(min_size=1, max_size=600).filter(lambda target: 0 not in target).map(os.fsdecode)
)
_MODE = st.integers(0, 0o7777)
_TIME = st.integers(0, 2**32 - 1)


@given(
    st.lists(
        st.one_of(
            st.builds(Member, _PATH, st.just("dir"), _MODE, _TIME, st.just(0), st.just("")),
            st.builds(Member, _PATH, st.just("symlink"), _MODE, _TIME, st.just(0), _TARGET),
            st.builds(Member, _PATH, st.just("hardlink"), _MODE, _TIME, st.just(0), _PATH),
            st.builds(
                Member, _PATH, st.just("file"), _MODE, _TIME, st.integers(0, 2000), st.just("")
            ),
        )
    ),
    st.integers(1, 3000),
)
def test_reads_any_member(members: list[Member], step: int) -> None:
    written = [(member, b"d" * member.size) for member in members]
    assert read(stream(written), step) == written


@given(st.binary(max_size=5000))
def test_rubbish_is_refused_or_incomplete(rubbish: bytes) -> None:
    reader = Reader()
    try:
        members = list(reader.feed(rubbish))
    except IntegrityError:
        return
    assert not members
    assert len(rubbish) < 512 or not any(rubbish[:512])


@given(st.integers(0, 2047), st.integers(1, 255))
def test_a_changed_byte_is_noticed_unless_it_is_data(position: int, change: int) -> None:
    data = b"z" * 300
    raw = bytearray(stream([(file("name", data), data)]))
    raw[position] ^= change
    reader = Reader()
    try:
        found = [bytes(piece) for _, piece in reader.feed(bytes(raw))]
    except IntegrityError:
        return
    complete = reader.ended and reader.at_boundary
    assert not complete or (512 <= position < 812 and found == [bytes(raw[512:812])])


def forged(info: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A header as Python's tarfile writes it."""
    return info.tobuf(form, errors="surrogateescape")


def of_type(flag: bytes, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = flag
    info.linkname = "target"
    return forged(info)


def owned() -> bytes:
    info = tarfile.TarInfo("x")
    info.uid = 1000
    return forged(info)


def named_owner() -> bytes:
    info = tarfile.TarInfo("x")
    info.uname = "root"
    return forged(info)


def sized(size: bytes) -> bytes:
    """A file's header with the given size field and a checksum that fits."""
    raw = bytearray(header(Member("x", "file", 0o644, MTIME, 0)))
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax() -> bytes:
    info = tarfile.TarInfo("x" * 200)
    return forged(info, tarfile.PAX_FORMAT)


PLAIN = header(Member("x", "file", 0o644, MTIME, 0))
NAMED = header(Member("x" * 200, "file", 0o644, MTIME, 0))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(of_type(b"3"), id="character device"),
        pytest.param(of_type(b"4"), id="block device"),
        pytest.param(of_type(b"6"), id="fifo"),
        pytest.param(of_type(b"7"), id="contiguous file"),
        pytest.param(of_type(b"S"), id="sparse file"),
        pytest.param(of_type(b"V"), id="volume label"),
        pytest.param(of_type(b"M"), id="continued from another volume"),
        pytest.param(of_type(b"D"), id="directory listing"),
        pytest.param(of_type(b"\0"), id="file of old tar"),
        pytest.param(pax(), id="pax"),
        pytest.param(of_type(b"g"), id="global pax"),
        pytest.param(
            forged(tarfile.TarInfo("x" * 50 + "/" + "y" * 90), tarfile.USTAR_FORMAT),
            id="ustar prefix",
        ),
        pytest.param(owned(), id="foreign owner"),
        pytest.param(named_owner(), id="owner by name"),
        pytest.param(sized(b"-0000000001\0"), id="negative size"),
        pytest.param(tarstream._render(b"x", "file", 0o10644, 0, 0, b""), id="mode over 07777"),
        pytest.param(
            tarstream._render(b"x", "file", 0o644, 2**32, 0, b""), id="mtime over 32 bits"
        ),
        pytest.param(sized(b"        10 \0"), id="size with blanks"),
        pytest.param(sized(b"0x000000010\0"), id="size in hexadecimal"),
        pytest.param(sized(b"\x80" + bytes(10) + b"\x01"), id="small size in base 256"),
        pytest.param(sized(b"\xff" * 12), id="negative size in base 256"),
        pytest.param(of_type(b"5", "x"), id="directory without its slash"),
        pytest.param(of_type(b"1", "x").replace(b"target", b"../../"), id="checksum"),
        pytest.param(NAMED[:512] + NAMED, id="two long names"),
        pytest.param(NAMED[:1024] + of_type(b"L", "x") + PLAIN, id="long name of a long name"),
        pytest.param(NAMED[:1024] + PLAIN, id="long name of something else"),
        pytest.param(tarstream._long(b"L", b"y") + PLAIN, id="long name for a short one"),
        pytest.param(tarstream._long(b"K", b"y" * 200) + PLAIN, id="long target of a file"),
        pytest.param(tarstream._long(b"L", b"y" * 5000) + PLAIN, id="name over PATH_MAX"),
        pytest.param(PLAIN[:50] + b"hidden" + PLAIN[56:], id="rubbish behind the name"),
        pytest.param(PLAIN[:500] + b"hidden" + PLAIN[506:], id="rubbish behind the header"),
        pytest.param(tarstream.TRAILER + PLAIN, id="member behind the end"),
        pytest.param(tarstream.TRAILER + bytes(512), id="zeros behind the end"),
        pytest.param(bytes(512) + PLAIN, id="one block of zeros"),
        pytest.param(header(file("x", b"a")) + b"a" + b"b" * 511, id="padding"),
    ],
)
def test_what_is_not_our_dialect_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        list(Reader().feed(raw))


BAD_PATHS = [
    "",
    "/etc/passwd",
    "/",
    "..",
    "../x",
    "a/../x",
    "a/..",
    "./x",
    "a/./x",
    "a//x",
    "a/",
    "a\0b",
    "n" * 256,
    "d/" + "n" * 256,
    "/".join("d" * 129),
    "/".join(["d" * 200] * 21),
]


def forged_path(path: str, kind: str) -> bytes:
    """The header of a path that header() refuses to write."""
    name = os.fsencode(path)
    if kind == "hardlink":
        return tarstream._render(b"link", kind, 0o644, MTIME, 0, name)
    return tarstream._render(name, kind, 0o644, MTIME, 0, b"to" if kind == "symlink" else b"")


@pytest.mark.parametrize("kind", ["file", "dir", "symlink", "hardlink"])
@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path[:20]))
def test_bad_paths_are_neither_written_nor_read(path: str, kind: str) -> None:
    member = Member(path, kind, 0o644, MTIME, 0, "to" if kind == "symlink" else "")
    if kind == "hardlink":
        member = Member("link", kind, 0o644, MTIME, 0, path)
    with pytest.raises(UsageError) as error:
        header(member)
    assert error.value.hint
    with pytest.raises(IntegrityError):
        list(Reader().feed(forged_path(path, kind)))


@pytest.mark.parametrize(
    "member",
    [
        Member(".", "file", 0o644, MTIME, 0),
        Member(".", "symlink", 0o777, MTIME, 0, "x"),
        Member("x", "hardlink", 0o644, MTIME, 0, "."),
        Member("x", "symlink", 0o777, MTIME, 0, ""),
        Member("x", "symlink", 0o777, MTIME, 0, "a\0b"),
        Member("x", "symlink", 0o777, MTIME, 0, "t" * 4096),
        Member("x", "file", 0o644, MTIME, 0, "target"),
        Member("x", "dir", 0o644, MTIME, 0, "target"),
    ],
    ids=lambda member: f"{member.kind} {member.path} to {member.target[:5]!r}",
)
def test_bad_members_are_neither_written_nor_read(member: Member) -> None:
    with pytest.raises(UsageError):
        header(member)
    name, link = member.path.encode(), member.target.encode()
    with pytest.raises(IntegrityError):
        list(Reader().feed(tarstream._render(name, member.kind, 0o644, MTIME, 0, link)))


def test_the_longest_members_fit_into_the_longest_header() -> None:
    path = "/".join(["d" * 200] * 20 + ["n" * 74])
    member = Member(path, "symlink", 0o777, MTIME, 0, "t" * tarstream.MAX_PATH)
    assert len(os.fsencode(path)) == tarstream.MAX_PATH - 1
    assert len(header(member)) <= tarstream.MAX_HEADER
    assert read(header(member) + tarstream.TRAILER) == [(member, b"")]


@pytest.mark.parametrize(
    ("path", "target", "inside"),
    [
        ("bin/python3", "python", True),
        ("bin/python3", "./python", True),
        ("lib64", "lib", True),
        ("a/b/c", "../../x", True),
        ("a/b/c", "../../../x", False),
        ("a/b", "..", True),
        ("a", "..", False),
        ("a", ".", True),
        ("a", "", False),
        ("a", "/usr/bin/python3", False),
        ("a/b", "x/../y", False),  # inside only as long as x is no link
        ("a/b", "..//./x/", True),
        ("a/b", "x/..", False),
        ("a/b", "...", True),
    ],
)
def test_links_that_stay_inside(path: str, target: str, inside: bool) -> None:
    assert stays_inside(path, target) is inside
