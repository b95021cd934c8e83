"""Rewriting an unpacked tree for another place than the one it was packed for.

Packing rewrites for one store path, the same on every node; a node that must use another place
unpacks the tree and applies the same steps again, from the packed prefix to the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from stager import walk
from stager.environments import ask
from stager.errors import IncompatibleError
from stager.formats.tarstream import Member
from stager.manifest import Layer, Manifest
from stager.packing import plan
from stager.packing.produce import Producer
from stager.packing.survey import SNAPSHOTS
from stager.rewriting import condameta
from stager.rewriting.bytecode import Compiler
from stager.rewriting.relocate import Move, Relocation
from stager.staging.store import Store
from stager.walk import FILE, Excluder


def rewrite(directory: str, manifest: Manifest, layer: Layer, node: Store) -> None:
    """Rewrite the tree of one layer in place, before it is moved to its path in the store.

    Args:
        directory: the unpacked tree.
        manifest: the environment; layers below are in the store already.
        layer: the layer the tree is of.
        node: the store it will be in.

    Raises:
        IncompatibleError: the base interpreter does not start here, or a compiled file has no room
            for so long a path.
    """
    recorded = condameta.read(directory)
    for path, one in condameta.too_long(recorded, len(os.fsencode(node.tree(layer.id)))):
        raise IncompatibleError(
            f"{path} of the package {one.package} has room for a path of {one.room} bytes;"
            f" {node.tree(layer.id)} is longer",
            hint="stage into a store with a shorter path (--store, STAGER_STORE)",
        )
    relocation = Relocation(Move(one.destination, node.tree(one.id)) for one in manifest.layers)
    python = relocation.path(manifest.python.base) or manifest.python.base
    if manifest.python.base.startswith(f"{layer.destination}/"):  # not in the store yet
        python = os.path.join(directory, os.path.relpath(manifest.python.base, layer.destination))
    interpreter = ask(python)
    library = f"lib/{os.path.basename(interpreter.library)}"
    place = plan.Place(
        root=layer.destination,
        destination=node.tree(layer.id),
        relocation=relocation,
        python_directories=(library, SNAPSHOTS),
        tag=interpreter.tag,
        interpreter=relocation.path(manifest.python.base) or manifest.python.base,
        base_executable=interpreter.base_executable,
        local=(),
        recorded=recorded,
    )
    entries = [entry for entry in walk.walk(directory, Excluder(())) if entry.kind == FILE]
    items, _ = plan.make(place, entries, compile_all=False)
    with Compiler(python, 1) as compiler:
        producer = Producer(place, (layer.destination,), interpreter.magic, compiler)
        for _ in producer.write(items, _InPlace(directory), slow=False):
            pass


class _InPlace:
    """A sink that replaces the files whose content changed, and touches nothing else."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._new = f"{directory}.new"  # beside the tree: in it there may be a file of any name

    def write_member(
        self, member: Member, data: bytes | Iterable[bytes | memoryview] = b""
    ) -> None:
        """Replace the member's file where ``data`` differs from it."""
        if member.kind != "file":
            return
        path = os.path.join(self._directory, member.path)
        if not isinstance(data, bytes):
            if not self._write_pieces(path, data):
                return
        else:
            with contextlib.suppress(FileNotFoundError):
                with open(path, "rb") as file:
                    if file.read() == data:
                        return
                os.unlink(path)
            with open(path, "xb") as file:
                file.write(data)
        os.chmod(path, member.mode)
        os.utime(path, (member.mtime, member.mtime))

    def _write_pieces(self, path: str, pieces: Iterable[bytes | memoryview]) -> bool:
        """Replace a large file, which is read while it is written; tells whether it changed."""
        done = 0
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(open(path, "rb"))
            file = None
            for piece in pieces:
                if file is None and old.read(len(piece)) != piece:
                    file = stack.enter_context(open(self._new, "xb"))
                    old.seek(0)
                    while done and (chunk := old.read(min(done, 1 << 20))):
                        file.write(chunk)
                        done -= len(chunk)
                if file is not None:
                    file.write(piece)
                else:
                    done += len(piece)
        if file is not None:
            os.replace(self._new, path)
        return file is not None
