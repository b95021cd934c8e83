"""Environments of a few files, packed and staged in a fraction of a second, in this process.

``environments.py`` makes real ones, which takes longer and needs a registry: these are for tests
of the machinery around them.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from environments import BASE_PYTHON
from stager import config as configuration
from stager import manifest
from stager.config import Config
from stager.environments import Request
from stager.manifest import Image, Layer, Manifest, Platform, Python
from stager.packing import pack
from stager.repository import Published, Repository
from stager.staging.store import Store

LIBRARY = f"lib/{BASE_PYTHON.name}"
SITE = f"{LIBRARY}/site-packages"
BASE_PREFIX = str(BASE_PYTHON.parent.parent)


def environment(prefix: Path, files: dict[str, str] | None = None) -> Path:
    """Write a virtual environment with one module, ``tiny``, by hand.

    Args:
        prefix: where; made.
        files: more files, by their path in it.
    """
    content = {
        "pyvenv.cfg": f"home = {BASE_PYTHON.parent}\ninclude-system-site-packages = false\n",
        "bin/activate": f"VIRTUAL_ENV={prefix}\nexport VIRTUAL_ENV\n",
        "bin/tiny": f"#!{prefix}/bin/python\nimport tiny\nprint(tiny.WHERE)\n",
        f"{SITE}/tiny.py": f"import sys\nORIGIN = {str(prefix)!r}\nWHERE = sys.prefix\n",
        **(files or {}),
    }
    for path, text in content.items():
        (prefix / path).parent.mkdir(parents=True, exist_ok=True)
        (prefix / path).write_text(text)
    (prefix / "bin" / "tiny").chmod(0o755)
    (prefix / "bin" / "python").symlink_to(BASE_PYTHON)
    return prefix


def configured(root: Path, **values: object) -> Config:
    """The configuration of a test: nothing of the machine's, everything below ``root``.

    Args:
        root: a short path, as that of the fixture ``public_path``: a store's has a limit.
        values: further keys, with ``_`` for ``.`` between the parts of a name.
    """
    overrides: dict[str, object] = {
        "store": f"{root}/store",
        "repository": f"{root}/repository",
        "local_prefixes": (BASE_PREFIX, "/usr"),
        "pack.threads": 1,
        "stage.how": "extract",
    }
    names = {key.replace(".", "_"): key for key in configuration.KEYS}
    overrides.update({names[name]: value for name, value in values.items()})
    return configuration.load(overrides=overrides, environ={}, site_directory="/nonexistent")


def packed(prefix: Path, config: Config, *, name: str | None = None) -> Published:
    """Pack an environment and publish it."""
    published = pack.pack(Request((str(prefix),)), config, name=name).published
    assert published is not None
    return published


def store(config: Config) -> Store:
    """The store of a configuration."""
    return Store(config["store"])


def described(
    *, name: str = "sample", origin: str = "/home/ada/sample", layers: tuple[Layer, ...] = ()
) -> Manifest:
    """A manifest of nothing that exists."""
    return Manifest(
        name=name,
        kind="venv",
        origin=origin,
        spellings=(origin,),
        layers=layers or (layer(),),
        python=Python("bin/python", platform.python_version(), "cpython-39", str(BASE_PYTHON)),
        platform=Platform(platform.machine(), ""),
        activation={"set": {}, "unset": [], "prepend": {}},
        watches=(),
        modules=(),
        options={},
        packed="2030-01-01T00:00:00Z",
        packer="0",
    )


def layer(number: int = 1, content: bytes = b"image", format: str = "squashfs") -> Layer:
    """A layer whose image is a few bytes."""
    import zlib

    identity = f"{number:016x}"
    image = Image(format, len(content), zlib.crc32(content))
    return Layer(identity, "env", "/o", f"/s/envs/{identity}", image, 1, len(content))


def publish(
    repository: Repository, value: Manifest, *, content: bytes = b"image", replace: bool = True
) -> Published:
    """Publish a manifest as a pack does, its images first."""
    with repository.workspace() as directory:
        for one in value.layers:
            path = os.path.join(directory, one.filename)
            Path(path).write_bytes(content)
            repository.add_image(path, one)
            record = {"layer": manifest.plain(one), "image": one.filename, "level": 3}
            repository.add_layer(one.id, one.image.format, record)
        return repository.publish(value, replace=replace)


def in_child(work: Callable[[], object]) -> int:
    """Run something in a forked process and give its status; a test may kill that process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
