"""The manifest: what a packed environment is, as a value and as canonical JSON.

The format is specified in ``docs/formats/manifest.md``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from stager.envpatch import EnvPatch
from stager.errors import IncompatibleError, IntegrityError
from stager.ref import is_name

USER, TREE = "user", "tree"
"""Kinds without a Python of their own: pip's user base, and directories of modules."""

SCHEMA = 1
"""Version of the manifest format; a reader refuses a newer one."""

_PLAIN: Mapping[str, type] = {"str": str, "int": int, "bool": bool}
_T = TypeVar("_T")


class Image(NamedTuple):
    """The one file that a layer is packed into.

    Attributes:
        format: ``squashfs`` or ``tar.zst``.
        size: its length in bytes.
        crc32: CRC-32 of its bytes: every copy of it is checked.
    """

    format: str
    size: int
    crc32: int


class Layer(NamedTuple):
    """One tree that is packed and staged as a unit.

    Attributes:
        id: 16 hex digits over what was packed and how; the same environment gives the same id.
        role: ``env``; ``base``; ``tree`` for another directory of modules; or ``path`` for one
            that a variable names beside the environment.
        origin: the prefix it was packed from.
        destination: the absolute prefix its files were rewritten for.
        image: the packed bytes.
        files: number of entries.
        size: bytes of all regular files, unpacked.
        spellings: every path the origin is known by.
    """

    id: str
    role: str
    origin: str
    destination: str
    image: Image
    files: int
    size: int
    spellings: tuple[str, ...] = ()

    @property
    def filename(self) -> str:
        """The image's name in a repository: what went in, and a sum over what came out."""
        return f"{self.id}-{self.image.crc32:08x}.{self.image.format}"


class Python(NamedTuple):
    """The interpreter an environment runs.

    Attributes:
        executable: path relative to the environment's prefix, such as ``bin/python``.
        version: ``X.Y.Z``.
        tag: the bytecode tag, such as ``cpython-311``.
        base: absolute path of the base interpreter: on the node's own disk, or in the base layer's
            destination.
    """

    executable: str
    version: str
    tag: str
    base: str


class Platform(NamedTuple):
    """What a node must offer: machine, and the highest glibc that a packed binary asks for."""

    machine: str
    glibc: str


class Watch(NamedTuple):
    """A path of the origin, and what it looked like when the environment was packed.

    Attributes:
        path: absolute path.
        mark: modification time and a summary of the content, see :mod:`stager.freshness`; empty
            where the path did not exist.
        tree: look at everything below it, as for editable sources.
    """

    path: str
    mark: str
    tree: bool = False


class Finding(NamedTuple):
    """Something the user should know about one path: what will not move, was left out, or changed.

    Attributes:
        path: path inside the layer, or absolute where it lies outside.
        code: a word to filter by, see ``docs/relocation.md``.
        reason: one sentence.
        severity: ``note``, ``warning`` or ``error`` (errors refuse the pack).
    """

    path: str
    code: str
    reason: str
    severity: str = "note"


class Manifest(NamedTuple):
    """A published environment: its layers from the bottom up, and what activation needs."""

    name: str
    kind: str
    origin: str
    spellings: tuple[str, ...]
    layers: tuple[Layer, ...]
    python: Python
    platform: Platform
    activation: Mapping[str, Any]
    watches: tuple[Watch, ...]
    modules: tuple[str, ...]
    options: Mapping[str, Any]
    packed: str
    packer: str
    schema: int = SCHEMA
    findings: tuple[Finding, ...] = ()

    @property
    def top(self) -> Layer:
        """The environment's own layer."""
        return self.layers[-1]

    @property
    def prefix(self) -> str:
        """The prefix everything was rewritten for."""
        return self.top.destination

    @property
    def local_base(self) -> str:
        """The base interpreter where it is the node's own, or empty where it is packed."""
        packed = any(self.python.base.startswith(f"{one.destination}/") for one in self.layers)
        return "" if packed else self.python.base

    @property
    def library(self) -> str:
        """The modules of such a Python, relative to a prefix: ``lib/python3.11``.

        A free-threaded one is called ``python3.13t``, and so are its modules.
        """
        name = "python" + ".".join(self.python.version.split(".")[:2])
        threaded = os.path.basename(self.python.base) == f"{name}t"
        return f"lib/{name}t" if threaded else f"lib/{name}"

    @property
    def original_python(self) -> str:
        """The interpreter that runs the original."""
        if self.kind not in (USER, TREE):
            return os.path.join(self.origin, self.python.executable)
        for one in self.layers:
            if self.python.base.startswith(f"{one.destination}/"):
                return one.origin + self.python.base[len(one.destination) :]
        return self.python.base

    def staged_at(self, prefix: str) -> tuple[str, ...]:
        """The trees of all layers, where the environment's own is at ``prefix``."""
        return tuple(os.path.join(os.path.dirname(prefix), layer.id) for layer in self.layers)

    def activated(self, trees: Sequence[str]) -> EnvPatch:
        """The activation, for these trees of its layers."""
        return EnvPatch.from_json(self.activation).at(*trees)

    def moved(self, trees: Sequence[str]) -> dict[str, str]:
        """Where in these trees of its layers what lay at the original's paths is, by old path.

        The base is not among them: not all of it is packed. Nor is what is not Python's below a
        user base, which goes on being used where it is.
        """
        part = f"/{self.library}" if self.kind == USER else ""
        own = (self.origin, *self.spellings)
        found = dict.fromkeys((one + part for one in own), trees[-1] + part)
        for layer, tree in zip(self.layers, trees):
            if layer.role == TREE:
                found.update(dict.fromkeys((layer.origin, *layer.spellings), tree))
        return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII, one final newline."""
        return canonical(plain(self))


def plain(value: Any) -> Any:
    """A value as JSON has it: named tuples are objects, other tuples lists."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def canonical(value: object) -> bytes:
    """Encode a JSON value canonically, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def digest(data: bytes) -> str:
    """The hex sha256 that names these bytes."""
    # hashlib loads OpenSSL, 5 ms for every job; `random` of the standard library does the same.
    for name in ("_sha256", "_sha2"):  # until 3.11, since 3.12
        with contextlib.suppress(ImportError):
            return str(__import__(name).sha256(data).hexdigest())
    import hashlib

    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: its bytes.
        where: the path they came from, for messages.

    Raises:
        IntegrityError: it is not a manifest, or damaged.
        IncompatibleError: it was written by a newer stager.
    """
    try:
        value = json.loads(data)
        schema = value["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"the manifest {where} is damaged", hint="pack the environment again"
        ) from error
    if not isinstance(schema, int) or schema > SCHEMA:
        raise IncompatibleError(
            f"the manifest {where} has format {schema!r}; this stager reads up to {SCHEMA}",
            hint="use a newer stager here, or pack the environment again with this one",
        )
    try:
        # What is read becomes paths, limits and shell code on a node: no type is believed.
        if not value["layers"] or not isinstance(value["options"], dict):
            raise ValueError("it has no layers or no options")
        if not is_name(value["name"]):
            raise ValueError("its name is malformed")
        return _made(
            Manifest,
            {
                **value,
                "spellings": _texts(value["spellings"]),
                "modules": _texts(value["modules"]),
                "layers": tuple(read_layer(item) for item in value["layers"]),
                "python": _made(Python, value["python"]),
                "platform": _made(Platform, value["platform"]),
                "activation": EnvPatch.from_json(value["activation"]).to_json(),
                "watches": tuple(_made(Watch, item) for item in value["watches"]),
                "findings": tuple(_made(Finding, item) for item in value["findings"]),
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"the manifest {where} is damaged: {error}", hint="pack the environment again"
        ) from error


def read_layer(item: Mapping[str, Any]) -> Layer:
    """Read a layer.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    spellings = _texts(item.get("spellings", ()))
    layer = _made(Layer, {**item, "image": _made(Image, item["image"]), "spellings": spellings})
    # These become path components on a node: nothing but what pack writes is believed.
    if not _is_id(layer.id):
        raise ValueError("a layer's id is malformed")
    if layer.image.format not in ("squashfs", "tar.zst"):
        raise ValueError(f"unknown image format {layer.image.format!r}")
    if not layer.destination.startswith("/") or "\0" in layer.destination:
        raise ValueError("a layer's destination is not an absolute path")
    if min(layer.files, layer.size, layer.image.size) < 0 or layer.image.crc32 >> 32:
        raise ValueError("a layer's size or checksum is malformed")
    return layer


def _made(kind: type[_T], item: Mapping[str, Any]) -> _T:
    """Make a named tuple; its texts and numbers are of the type that it declares."""
    made = kind(**item)
    for name, declared in declarations(kind):
        if declared in _PLAIN and type(getattr(made, name)) is not _PLAIN[declared]:
            raise TypeError(f"`{name}` is of another type")
    return made


def declarations(kind: type) -> Iterator[tuple[str, str]]:
    """The fields of a named tuple, each with its type as it is written."""
    for name, declared in kind.__annotations__.items():
        yield name, str(getattr(declared, "__forward_arg__", declared))


def _texts(items: Sequence[object]) -> tuple[str, ...]:
    if not all(isinstance(item, str) for item in items):
        raise TypeError("expected a string")
    return tuple(str(item) for item in items)


def _is_id(text: object) -> bool:
    return isinstance(text, str) and len(text) == 16 and not set(text) - set("0123456789abcdef")
