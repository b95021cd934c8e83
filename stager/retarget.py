"""Rewriting an unpacked tree for another place than the one it was packed for.

Packing rewrites for one store path, the same on every node; a node that must use another place
unpacks the tree and applies the same steps again, from the packed prefix to the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from stager import plan, walk
from stager.bytecode import Compiler
from stager.environments import ask
from stager.formats.tarstream import Member
from stager.manifest import Layer, Manifest
from stager.produce import Producer
from stager.relocate import Move, Relocation
from stager.store import Store
from stager.walk import FILE, Excluder


def rewrite(directory: str, manifest: Manifest, layer: Layer, node: Store) -> None:
    """Rewrite the tree of one layer in place, before it is moved to its path in the store.

    Args:
        directory: the unpacked tree.
        manifest: the environment; layers below are in the store already.
        layer: the layer the tree is of.
        node: the store it will be in.

    Raises:
        IncompatibleError: the base interpreter does not start here.
    """
    relocation = Relocation(Move(one.destination, node.tree(one.id)) for one in manifest.layers)
    python = relocation.path(manifest.python.base) or manifest.python.base
    if layer.role == "base":
        python = os.path.join(directory, os.path.relpath(manifest.python.base, layer.destination))
    interpreter = ask(python)
    library = f"lib/{os.path.basename(interpreter.library)}"
    place = plan.Place(
        root=layer.destination,
        destination=node.tree(layer.id),
        relocation=relocation,
        python_directories=(library, ".stager/editable"),
        tag=interpreter.tag,
        interpreter=relocation.path(manifest.python.base) or manifest.python.base,
        base_executable=interpreter.base_executable,
        local=(),
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

    def write_member(
        self, member: Member, data: bytes | Iterable[bytes | memoryview] = b""
    ) -> None:
        """Replace the member's file where ``data`` differs from it."""
        if member.kind != "file" or not isinstance(data, bytes):
            return  # only files with a prefix in them change, and those are held whole
        path = os.path.join(self._directory, member.path)
        with contextlib.suppress(FileNotFoundError):
            with open(path, "rb") as file:
                if file.read() == data:
                    return
            os.unlink(path)
        with open(path, "xb") as file:
            file.write(data)
        os.chmod(path, member.mode)
        os.utime(path, (member.mtime, member.mtime))
