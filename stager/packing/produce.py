"""From a plan to the bytes of an image: read once, rewrite in flight, hand on in order."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Protocol, Union

from stager.formats.tarstream import Member
from stager.manifest import Finding
from stager.packing import plan, reading
from stager.packing.plan import Item, Place
from stager.packing.strays import Strays
from stager.rewriting import bytecode, condameta, elf, prefix, relocate
from stager.rewriting.bytecode import Compiler
from stager.rewriting.condameta import Recorded
from stager.walk import SLOW_WORKERS, Entry

SMALL = 4 << 20
"""Files up to this many bytes are read whole; larger ones pass through in pieces."""
_CHUNK = 1 << 20
_LARGEST_TEXT = 256 << 20
_AHEAD_FILES = 256
_AHEAD_BYTES = 64 << 20

Data = Union[bytes, Iterable[Union[bytes, memoryview]]]
_Members = list[tuple[Member, Data]]


class Sum(Protocol):
    """A checksum of :mod:`hashlib`."""

    def digest(self) -> bytes:
        """The sum."""

    def hexdigest(self) -> str:
        """The sum in hexadecimal digits."""


class Sink(Protocol):
    """Where members go: one image being written."""

    def write_member(self, member: Member, data: Data = b"") -> None:
        """Append one member; ``data`` has exactly ``member.size`` bytes."""


class Outcome:
    """What writing a layer brought to light.

    Attributes:
        rewritten: files whose content changed, with base64 sha256 (unpadded) and size.
        installed: sizes before, of those of them that were as conda recorded them.
        findings: what the user should know.
        glibc: the highest version any binary asks for.
        compiled: modules that got new bytecode.
    """

    # No data class: their module takes as long to load as a hundred files to pack.
    def __init__(self) -> None:
        self.rewritten: dict[str, tuple[str, int]] = {}
        self.installed: dict[str, int] = {}
        self.findings: list[Finding] = []
        self.glibc: tuple[int, int] | None = None
        self.compiled = self.files = self.bytes = 0


class Producer:
    """Turns the items of one layer into members.

    Args:
        place: where the layer comes from and goes to.
        spellings: every path the layer's root is known by.
        magic: magic number of the interpreter's bytecode.
        compiler: compiles sources without valid bytecode.
    """

    def __init__(
        self, place: Place, spellings: tuple[str, ...], magic: bytes, compiler: Compiler
    ) -> None:
        self.outcome = Outcome()
        self._place = place
        self._spellings = spellings
        self._magic = magic
        self._compiler = compiler
        self._lock = threading.Lock()
        self._strays = Strays(place)
        # Whether the bytecode that was looked at last was not valid: the next will be as it was.
        # A copy of an environment with new times has all of it compiled, by all processes.
        self._outdated = False

    def write(self, items: Sequence[Item], sink: Sink, *, slow: bool) -> Iterator[Item]:
        """Write every item, yielding it when it is written.

        Args:
            items: the plan.
            sink: the image.
            slow: the files lie on a network file system: read many at once.

        Raises:
            IntegrityError: a file changed since the tree was walked.
            DeniedError: a file cannot be read.
        """
        for item, produced in self._produced(items, slow):
            for member, data in produced:
                sink.write_member(member, data)
                self.outcome.files += 1
                self.outcome.bytes += member.size
            yield item
        self.outcome.findings += self._strays.findings()

    def _produced(self, items: Sequence[Item], slow: bool) -> Iterator[tuple[Item, _Members]]:
        # On a local disk, compiling is all that can overlap; one thread for each worker process.
        workers = SLOW_WORKERS if slow else self._compiler.workers
        with ThreadPoolExecutor(workers) as pool:
            # The first to be compiled waits for a worker to start, so it does not wait its turn.
            first = next(filter(self._is_compiled, items), None)
            early = pool.submit(self._members, first).result if first is not None else None
            ahead: deque[tuple[Item, Callable[[], _Members] | None]] = deque()
            held = 0
            try:
                for item in items:
                    begun = early if item is first else self._begin(pool, item, slow)
                    if begun is None and not ahead:
                        yield item, self._members(item)  # by far the most on a local disk
                        continue
                    ahead.append((item, begun))
                    held += _held(item)
                    while ahead and (
                        ahead[0][1] is None or len(ahead) > _AHEAD_FILES or held > _AHEAD_BYTES
                    ):
                        held -= _held(ahead[0][0])
                        yield self._finish(*ahead.popleft())
                while ahead:
                    yield self._finish(*ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, item: Item, slow: bool
    ) -> Callable[[], _Members] | None:
        """Begin what can be done before it is an item's turn; None where nothing can."""
        entry = item.entry
        if entry is None or item.kind in ("dir", "symlink"):
            return None
        if item.kind in plan.LAST:  # a record depends on every file before it, but not its reading
            if not slow:
                return None
            early = pool.submit(reading.read, entry)
            return lambda: self._members(item, early.result())
        if entry.size > SMALL or not (slow or self._is_compiled(item)):
            return None  # large files are streamed, not held
        return pool.submit(self._members, item).result

    def _is_compiled(self, item: Item) -> bool:
        """Tell whether a module will be compiled, as far as can be known without reading it."""
        if not item.tag:
            return False
        if item.pyc is None or self._outdated:
            return True
        recorded = self._place.recorded.get(item.path)
        return recorded is not None and bool(recorded.mode)  # it will be rewritten

    def _finish(self, item: Item, begun: Callable[[], _Members] | None) -> tuple[Item, _Members]:
        return item, begun() if begun is not None else self._members(item)

    def _members(self, item: Item, data: bytes | None = None) -> _Members:
        if item.kind in ("dir", "symlink"):
            return [(Member(item.path, item.kind, item.mode, item.mtime, 0, item.target), b"")]
        entry = item.entry
        assert entry is not None
        if data is None:
            if entry.size > SMALL and not item.tag:  # bytecode needs its source whole
                return [self._large(item, entry)]
            data = reading.read(entry)
        content = self._content(item, data)
        members: _Members = [(_file(item, content), content)]
        if item.tag:
            members += self._bytecode(item, content, rewritten=content is not data)
        return members

    # -- bytecode ---------------------------------------------------------------------------

    def _bytecode(
        self, item: Item, source: bytes, *, rewritten: bool
    ) -> Iterator[tuple[Member, Data]]:
        entry = item.entry
        assert entry is not None
        path = bytecode.cached(item.path, item.tag)
        new_name = f"{self._place.destination}/{item.path}"
        recorded = path in self._place.recorded
        before = b""
        if item.pyc is not None and (recorded or not rewritten):
            before = reading.read(item.pyc)
        pyc = b"" if rewritten else bytecode.unchecked(before, self._magic, source)
        valid = bytecode.is_valid(pyc, self._magic, item.mtime, len(source))
        if item.pyc is not None and not rewritten:
            self._outdated = not valid
        if valid:
            names = self._old_names(item.path, entry.source)
            while left := self._place.relocation.touches(pyc):
                old_name = next(names, None)
                if old_name is None:
                    break
                pyc = bytecode.move(pyc, old_name, new_name)
            if left:
                self._leftover(path, pyc, "a constant in bytecode names the original place")
        else:
            compiled = self._compiler.compile(source, new_name)
            if compiled is None:
                return
            pyc = compiled
            with self._lock:
                self.outcome.compiled += 1
        if item.pyc is not None and recorded:
            self._note(path, before, pyc)
        mode = item.mode & 0o644
        yield Member(path, "file", mode, item.mtime, len(pyc), ""), pyc

    def _old_names(self, path: str, source: str) -> Iterator[str]:
        yield source
        for spelling in self._spellings:
            if f"{spelling}/{path}" != source:
                yield f"{spelling}/{path}"

    # -- contents ---------------------------------------------------------------------------

    def _content(self, item: Item, data: bytes) -> bytes:
        if data.startswith(b"#!") and item.mode & 0o111:
            self._strays.look_at_first_line(item.path, data)
        content = self._by_name(item, data)
        if content is None:
            content = self._by_content(item.path, data)
        if content == data:
            return data
        self._note(item.path, data, content)
        return content

    def _by_name(self, item: Item, data: bytes) -> bytes | None:
        """Rewrite a file whose name or record tells what is in it; None for any other."""
        path, relocation = item.path, self._place.relocation
        recorded = self._place.recorded.get(path)
        if path == "pyvenv.cfg":
            interpreter = self._place.interpreter
            values = {"home": os.path.dirname(interpreter), "executable": interpreter}
            # Which Python made it may be another environment's, which nothing else speaks of.
            command = re.search(rb"^command\s*=\s*(.+?) -m ", data, re.MULTILINE)
            if command is not None:
                start, end = command.span(1)
                data = data[:start] + os.fsencode(interpreter) + data[end:]
            return relocation.text(relocate.rewrite_config(data, values))
        if path.endswith((".pth", ".egg-link")) and self._in_python_directory(path):
            self._strays.look_at_code(path, data)
            directory = os.path.dirname(self._original(path))
            return relocate.rewrite_paths(data, directory, relocation)
        if item.kind == "record":
            return self._record(path, relocation.text(data))
        if item.kind == "conda":
            updated = condameta.update(data, self.outcome.rewritten, self.outcome.installed)
            return relocation.text(updated)
        if recorded is not None and recorded.mode:
            return self._declared(path, data, recorded)
        return None

    def _by_content(self, path: str, data: bytes) -> bytes:
        relocation = self._place.relocation
        if data[:4] == b"\x7fELF":
            return self._binary(path, data)
        if relocate.wide_encoding(data):
            return relocation.wide_text(data)
        if not relocation.touches(data):
            return data
        if path.endswith(".pyc"):
            # A module without source; its name is all that can be moved.
            content = data
            for old in self._old_names(path[: -len("c")], self._original(path[: -len("c")])):
                content = bytecode.move(content, old, f"{self._place.destination}/{path[:-1]}")
            what = "bytecode without source"
        elif relocate.is_binary(data):
            content = relocate.rewrite_archive(data, relocation)
            what = "a binary file"
        else:
            content = relocation.text(data)
            what = "part of another path"
        self._leftover(path, content, what)
        return content

    def _note(self, path: str, data: bytes, content: bytes) -> None:
        if content != data:
            recorded = self._place.recorded.get(path)
            if recorded is not None and recorded.checksum == hashlib.sha256(data).hexdigest():
                self.outcome.installed[path] = len(data)
            self._note_sum(path, hashlib.sha256(content), len(content))

    def _note_sum(self, path: str, after: Sum, size: int) -> None:
        checksum = base64.urlsafe_b64encode(after.digest()).rstrip(b"=").decode()
        self.outcome.rewritten[path] = (checksum, size)

    def _declared(self, path: str, data: bytes, recorded: Recorded) -> bytes:
        """Rewrite a file that an installer put the prefix into."""
        relocation = self._place.relocation
        if recorded.mode == condameta.BINARY:
            self._inspect(path, lambda offset, length: data[offset : offset + length])
            content, _ = relocation.strings(data, certain=True)
            self._leftover(path, content, "a compiled file without room for the new path")
        else:
            # An edited one may name other paths that only begin as this one does.
            certain = hashlib.sha256(data).hexdigest() == recorded.checksum
            content = relocation.text(data, certain=certain)
            self._leftover(path, content, "part of another path")
        return content

    def _original(self, path: str) -> str:
        return f"{self._place.root}/{path}"

    def _in_python_directory(self, path: str) -> bool:
        return plan.is_below(path, self._place.python_directories)

    def _binary(self, path: str, data: bytes) -> bytes:
        info = self._inspect(path, lambda offset, length: data[offset : offset + length])
        if info is not None and info.runpath:
            runpath = self._new_runpath(path, info)
            if runpath is not None:
                replaced = elf.replace_runpath(data, info, runpath)
                if replaced is None:
                    self._find(
                        path, "runpath", f"its library path {info.runpath} cannot be moved in place"
                    )
                else:
                    data = replaced
        if self._place.relocation.touches(data):
            data, _ = self._place.relocation.strings(data)
            self._leftover(path, data, "a compiled file")
        return data

    def _new_runpath(self, path: str, info: elf.Elf) -> str | None:
        new_directory = os.path.dirname(f"{self._place.destination}/{path}")
        return elf.move_runpath(
            info, self._place.relocation.path, new_directory, self._place.destination
        )

    def _inspect(self, path: str, read_at: elf.Read) -> elf.Elf | None:
        try:
            info = elf.inspect(read_at)
        except elf.MalformedError as error:
            self._find(path, "elf", f"a damaged ELF file: {error}", "note")
            return None
        if info is not None:
            if info.glibc is not None:
                with self._lock:
                    self.outcome.glibc = max(self.outcome.glibc or info.glibc, info.glibc)
            self._strays.look_at_binary(path, info)
        return info

    def _leftover(self, path: str, data: bytes, what: str) -> None:
        # Any trace of the bytes counts, also where they are part of another path: whoever looks for
        # the original's name in the staged tree finds nothing that was not told.
        if self._place.relocation.touches(data):
            self._find(path, "leftover", f"{what}: the original path in it is left", "note")

    def _find(self, path: str, code: str, reason: str, severity: str = "warning") -> None:
        with self._lock:
            self.outcome.findings.append(Finding(path, code, reason, severity))

    def _record(self, path: str, data: bytes) -> bytes:
        """Bring the hashes and sizes of a RECORD up to date (PEP 376, PEP 627)."""
        site = os.path.dirname(os.path.dirname(path))
        # Only these can be meant by a line, however it spells the path.
        names = {os.path.basename(one) for one in self.outcome.rewritten}
        lines = []
        for line in data.decode("utf-8", "surrogateescape").splitlines(keepends=True):
            fields = next(csv.reader([line]), []) if '"' in line else line.rstrip().split(",")
            name, checksum, *_ = [*fields, "", ""]
            new = None
            if name.rpartition("/")[2] in names:
                target = os.path.normpath(os.path.join(site, name))
                new = self.outcome.rewritten.get(target)
            quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"') else name
            if name.endswith(".pyc") and checksum:
                lines.append(f"{quoted},,\n")  # may have been moved or compiled; empty is allowed
            elif new is not None and checksum:
                lines.append(f"{quoted},sha256={new[0]},{new[1]}\n")
            else:
                lines.append(line)
        return "".join(lines).encode("utf-8", "surrogateescape")

    # -- large files ------------------------------------------------------------------------

    def _large(self, item: Item, entry: Entry) -> tuple[Member, Data]:
        recorded = self._place.recorded.get(item.path)
        with reading.opened(entry) as fd:
            head = os.pread(fd, _CHUNK, 0)
            text = not relocate.is_binary(head) or head.startswith(b"#!")
            text = text and entry.size <= _LARGEST_TEXT
            info = self._inspect(item.path, elf.reader(fd))
        member = Member(item.path, "file", item.mode, item.mtime, entry.size, "")
        if recorded is not None and recorded.mode == condameta.BINARY:
            return member, self._strings(item, entry)
        if text or (info is not None and self._new_runpath(item.path, info) is not None):
            content = self._content(item, reading.read(entry))
            return _file(item, content), content
        return member, self._pieces(item, entry)

    def _strings(self, item: Item, entry: Entry) -> Iterator[bytes]:
        """A large compiled file with the prefix in it, never held whole."""
        relocation = self._place.relocation
        before, after = hashlib.sha256(), hashlib.sha256()
        left = 0
        for piece in prefix.whole_strings(reading.pieces(entry), relocation.needles):
            before.update(piece)
            content, kept = relocation.strings(piece, certain=True)
            after.update(content)
            left += kept
            yield content
        if after.digest() != before.digest():
            if self._place.recorded[item.path].checksum == before.hexdigest():
                self.outcome.installed[item.path] = entry.size
            self._note_sum(item.path, after, entry.size)
        if left:
            reason = "a large compiled file without room for the new path: the original is left"
            self._find(item.path, "leftover", reason, "note")

    def _pieces(self, item: Item, entry: Entry) -> Iterator[memoryview]:
        relocation = self._place.relocation
        overlap = max(map(len, relocation.needles), default=1) + 1
        tail, left = b"", False
        for piece in reading.pieces(entry):
            if not left:
                buffer, count = piece.obj, len(piece)
                assert isinstance(buffer, bytearray)  # a view of one has no find
                left = relocation.touches(buffer, count) or relocation.touches(
                    tail + buffer[: min(overlap, count)]
                )
                tail = bytes(buffer[max(0, count - overlap) : count])
            yield piece
        if left:
            self._find(
                item.path,
                "leftover",
                "a large binary file: the original path in it is left",
                "note",
            )


def _held(item: Item) -> int:
    return item.entry.size if item.entry is not None and item.entry.size <= SMALL else 0


def _file(item: Item, content: bytes) -> Member:
    return Member(item.path, "file", item.mode, item.mtime, len(content), "")
