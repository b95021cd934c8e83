"""Lays out the machine's own CPython (Debian's) below $PREFIX, as a conda package has it.

The interpreter and the shared library are linked anew from the archive that Debian has of them,
which takes a second: so the prefix is baked into them, with the padding that lets it be replaced.
Debian has changed a few lines of the standard library to look for packages in other places than
everybody else's Python does; these are changed back.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PREFIX = Path(os.environ["PREFIX"])
RECIPE = Path(os.environ["RECIPE_DIR"])
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
NAME = f"python{VERSION}"
MULTIARCH = sysconfig.get_config_var("MULTIARCH")
STDLIB = Path(sysconfig.get_path("stdlib"))
CONFIG = Path(sysconfig.get_config_var("LIBPL"))
LIB = PREFIX / "lib" / NAME

UNWANTED = (
    *("__pycache__", "site-packages", "dist-packages", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "*.a", "*.o"),
    *("libpython*.so", "_test*.so", "_xx*.so", "xx*.so", "nis.*.so", "_dbm.*.so", "_ctypes_test.*"),
)
ELSEWHERE = r"bin/(?:install|dtrace|env)|(?:lib|share|share/lib)/zoneinfo"
"""What stays in /usr."""


def main() -> None:
    shutil.copytree(STDLIB, LIB, ignore=shutil.ignore_patterns(*UNWANTED))
    (LIB / "site-packages").mkdir()
    (LIB / "site-packages" / "README.txt").write_text("Packages are installed here.\n")
    replace(
        LIB / "site.py",
        'is_virtual_environment = sys.base_prefix != sys.prefix or hasattr(sys, "real_prefix")',
        "is_virtual_environment = True",
    )
    replace(
        LIB / "sysconfig.py",
        'if sys.base_prefix != sys.prefix or hasattr(sys, "real_prefix"):',
        "if True:",
    )

    headers = PREFIX / "include" / NAME
    shutil.copytree(f"/usr/include/{NAME}", headers)
    shutil.copy(f"/usr/include/{MULTIARCH}/{NAME}/pyconfig.h", headers)

    (PREFIX / "bin").mkdir()
    (PREFIX / "lib" / "pkgconfig").mkdir()
    for name in (f"python-{VERSION}.pc", f"python-{VERSION}-embed.pc"):
        shutil.copy(f"/usr/lib/{MULTIARCH}/pkgconfig/{name}", PREFIX / "lib" / "pkgconfig")
    shutil.copy(f"/usr/bin/{NAME}-config", PREFIX / "bin")
    for path in (
        *LIB.glob("_sysconfigdata_*.py"),
        *LIB.glob("config-*/Makefile"),
        *PREFIX.glob("lib/pkgconfig/*"),
        PREFIX / "bin" / f"{NAME}-config",
    ):
        path.write_text(moved(path.read_text()))

    link()
    script = PREFIX / "bin" / f"pydoc{VERSION}"
    script.write_text(f"#!{PREFIX}/bin/{NAME}\nimport pydoc\npydoc.cli()\n")
    script.chmod(0o755)
    for name, target in (
        *((f"bin/{name}", NAME) for name in ("python", "python3", "python3.1")),
        ("bin/python3-config", f"{NAME}-config"),
        ("bin/pydoc", script.name),
        (f"lib/lib{NAME}.so", f"lib{NAME}.so.1.0"),
    ):
        (PREFIX / name).symlink_to(target)
    # -B: what is imported for this is to be compiled like the rest.
    run(PREFIX / "bin" / NAME, "-BI", "-m", "compileall", "-q", f"lib/{NAME}", cwd=PREFIX)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(
            f"{path.name} of Debian's Python {platform.python_version()} has not: {old}"
        )
    path.write_text(text.replace(old, new))


def moved(text: str) -> str:
    """Text of Debian's that names its prefix, for ours."""
    text = text.replace(f"/usr/lib/{MULTIARCH}", f"{PREFIX}/lib")
    below = rf"/(?!{ELSEWHERE})(?:bin|lib|include|share)\b"
    return re.sub(rf"(?<!\.)/usr(?={below}|['\"\s]|$)", str(PREFIX), text)


def link() -> None:
    """``bin/python3.X`` and ``lib/libpython3.X.so.1.0``."""
    libraries = [
        word
        for variable in ("LIBS", "MODLIBS", "SYSLIBS")
        for word in sysconfig.get_config_var(variable).split()
        if word.startswith("-l")
    ]
    shared = f"lib{NAME}.so.1.0"
    run("gcc", "-fPIC", "-O1", f'-DPREFIX="{PREFIX}"', "-c", RECIPE / "prefix.c", "-o", "prefix.o")
    for archive, result, *options in (
        # Debian's archive for programs has code that must not be moved.
        ("", f"bin/{NAME}", "-no-pie", "-Wl,--export-dynamic", CONFIG / "python.o"),
        ("-pic", f"lib/{shared}", "-shared", f"-Wl,-soname,{shared}"),
    ):
        shutil.copy(CONFIG / f"lib{NAME}{archive}.a", "lib.a")
        run("ar", "x", "lib.a", "getpath.o", "frozen.o")
        run("objcopy", "--redefine-sym", "Py_DecodeLocale=prefix_DecodeLocale", "getpath.o")
        # Debian's site.py is in here as well, and would be taken instead of the file.
        frozen = Path("frozen.o").read_bytes()
        if frozen.count(b"\0site\0") != 1:
            raise SystemExit("cannot tell where frozen.o names the module site")
        Path("frozen.o").write_bytes(frozen.replace(b"\0site\0", b"\0none\0"))
        run("ar", "rs", "lib.a", "getpath.o", "frozen.o", "prefix.o")
        whole = ("-Wl,--whole-archive", "lib.a", "-Wl,--no-whole-archive")
        run("gcc", *options, "-o", PREFIX / result, *whole, *libraries, f"-Wl,-rpath,{PREFIX}/lib")
    run("strip", "-g", PREFIX / "bin" / NAME, PREFIX / "lib" / shared)


def run(*argv: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(one) for one in argv], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
