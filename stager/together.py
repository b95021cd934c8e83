"""Whether several environments can be used together, and what two of them both have."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator, Sequence

from stager.activate import Part
from stager.errors import IncompatibleError
from stager.manifest import Manifest

_SHOWN = 6


def require(manifests: Sequence[Manifest]) -> None:
    """Refuse environments of different Pythons.

    Raises:
        IncompatibleError: naming two of them.
    """
    first = manifests[0]
    for other in manifests[1:]:
        if (other.python.tag, other.library) != (first.python.tag, first.library):
            raise IncompatibleError(
                f"`{first.name}` is for Python {first.python.version}, `{other.name}` for"
                f" {other.python.version}",
                hint="environments that are used together need the same Python",
            )


def conflicts(parts: Sequence[Part]) -> Iterator[str]:
    """Say of each two environments which of what they both have is not the same in both.

    Looks into the trees, which must be staged.
    """
    for number, upper in enumerate(parts):
        for lower in parts[:number]:
            names = sorted(_different(lower, upper), key=str.lower)
            if names:
                shown = ", ".join(names[:_SHOWN])
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                yield (
                    f"`{lower.manifest.name}` and `{upper.manifest.name}` both have"
                    f" {shown}{more}: those of `{upper.manifest.name}` are used"
                )


def _different(lower: Part, upper: Part) -> set[str]:
    """Packages of other versions, and modules that are of no package and differ."""
    below, above = _versions(lower), _versions(upper)
    both = set(lower.manifest.modules) & set(upper.manifest.modules)
    found = {
        f"{name} ({below[name]}, {above[name]})"
        for name in set(below) & set(above)
        if below[name] != above[name] and name not in ("pip", "setuptools", "wheel")
    }
    named = {name.partition(" ")[0].replace("-", "_") for name in found}
    for module in both - named:
        old, new = _file(lower, module), _file(upper, module)
        if old and new and not filecmp.cmp(old, new, shallow=False):
            found.add(module)
    return found


def _versions(part: Part) -> dict[str, str]:
    found: dict[str, str] = {}
    for site in part.sites:
        for name in os.listdir(site) if os.path.isdir(site) else ():
            match = re.match(r"(.+?)-(\d.*?)\.(?:dist|egg)-info\Z", name)
            if match:
                found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


def _file(part: Part, module: str) -> str:
    """The file that is run when a module is imported, or empty."""
    for site in part.sites:
        for name in (f"{module}/__init__.py", f"{module}.py"):
            path = os.path.join(site, name)
            if os.path.isfile(path):
                return path
    return ""
