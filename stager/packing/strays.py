"""What files ask of places neither in a layer nor on the node, told once for each place."""

from __future__ import annotations

import os
import re
import threading

from stager.manifest import Finding
from stager.packing.plan import Place
from stager.paths import is_within
from stager.rewriting import elf, relocate

_DOES = {
    "interpreter": "is loaded by",
    "runpath": "looks for libraries in",
    "script": "is started by",
    "module-path": "has code that names",
}
_QUOTED_PATH = re.compile(rb"['\"](/[^'\"]+)['\"]")


class Strays:
    """Those of one layer; many threads may look at its files.

    Args:
        place: where the layer comes from and goes to.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._paths: dict[tuple[str, str], list[str]] = {}

    def look_at_binary(self, path: str, info: elf.Elf) -> None:
        """Note what a compiled file is loaded by, or with."""
        asked = [("interpreter", info.interpreter)] if info.interpreter else []
        directory = os.path.dirname(f"{self._place.root}/{path}")
        asked += [("runpath", one) for one in elf.search_paths(info, directory)]
        for kind, target in asked:
            if not self._is_known(target):
                self._note(kind, target, path)

    def look_at_first_line(self, path: str, data: bytes) -> None:
        """Note what starts a script.

        It may be the original in a way that no rewriting knows of: by a link to its Python, or from
        the directory where the script is called.
        """
        target = relocate.shebang(data)
        if target.startswith("/"):
            known = self._is_known(target) or not os.path.exists(target)
        else:
            known = re.fullmatch(r"[^$`]*/python[\d.]*t?", target) is None
        if not known:
            self._note("script", target, path)

    def look_at_code(self, path: str, data: bytes) -> None:
        """Note what code in a path file names."""
        lines = (line for line in data.splitlines() if line.startswith((b"import ", b"import\t")))
        for quoted in _QUOTED_PATH.findall(b"\n".join(lines)):
            target = os.path.normpath(os.fsdecode(quoted))
            if os.path.exists(target) and not self._is_known(target):
                self._note("module-path", target, path)

    def findings(self) -> list[Finding]:
        """One for each place: many files of one package may name the same."""
        found = []
        for (kind, target), paths in sorted(self._paths.items()):
            there = not target.startswith("/") or os.path.exists(target)
            where = "which is not on the node" if there else "which does not exist"
            if not target.startswith("/"):
                where = "whatever that is in the directory where it is called"
            others = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            code = "interpreter" if kind == "script" else kind
            reason = f"{_DOES[kind]} {target}, {where}{others}"
            found.append(Finding(min(paths), code, reason, "warning" if there else "note"))
        return found

    def _is_known(self, target: str) -> bool:
        return (
            is_within(target, self._place.local) or self._place.relocation.path(target) is not None
        )

    def _note(self, kind: str, target: str, path: str) -> None:
        with self._lock:
            self._paths.setdefault((kind, target), []).append(path)
