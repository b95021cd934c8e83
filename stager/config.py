"""Configuration: one table of keys, and where every value came from.

Precedence: command line > ``STAGER_*`` > the user's file > ``/etc/stager/config.d/*.yaml`` >
``/etc/stager/config.yaml`` > defaults. Root hooks pass ``trusted_only=True``: they read only
``/etc/stager``, refuse a file others may write, and ignore the environment.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Callable, NamedTuple, TextIO

from stager import fsutil, warm
from stager.errors import SITE, OptionError, UsageError

SITE_DIRECTORY = "/etc/stager"
COMMAND_LINE = "command line"
"""The source of a value that was given to the command itself."""
MAX_STORE_BYTES = 100
"""Longest store path: shebang lines (127 bytes on old kernels) and padded binaries must hold it."""

_YAML = "a line is `KEY: VALUE`, in UTF-8; `stager config show` lists the keys"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: object) -> int:
    """Parse a size such as ``500MiB``, ``10G`` or ``4096`` into bytes; K is 1024.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip())
    if match is None:
        raise ValueError("expected a size such as 500MiB, 10GiB or 4096")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_duration(text: object) -> float:
    """Parse a duration such as ``30s``, ``5m``, ``1.5h`` or ``20`` into seconds.

    Raises:
        ValueError: it is not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", str(text).strip())
    if match is None:
        raise ValueError("expected a duration such as 30s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def as_text(key: str, value: Any) -> str:
    """A value as a configuration file or a variable has it: parsed, it is that value again.

    Args:
        key: whose value it is.
        value: parsed. Sizes are bytes, durations seconds and the only fractions.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ":".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}s" if value % 60 or not value else _in_units(value, "mhd", _SECONDS)
    if KEYS[key].parse is parse_size:
        return f"{_in_units(value, 'KMGT', _UNITS)}iB" if value and not value % 1024 else str(value)
    return str(value)


def _in_units(value: float, units: str, sizes: Mapping[str, float]) -> str:
    """A number in the largest unit of which it is a multiple."""
    unit = next(one for one in reversed(units) if not value % sizes[one])
    return f"{value / sizes[unit]:.0f}{unit}"


def _integer(text: object) -> int:
    if isinstance(text, bool) or not re.fullmatch(r"-?\d+", str(text).strip()):
        raise ValueError("expected a whole number")
    return int(str(text))


def _between(low: int, high: int) -> Callable[[object], int]:
    def parse(text: object) -> int:
        value = _integer(text)
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return value

    return parse


def _boolean(text: object) -> bool:
    if isinstance(text, bool):
        return text
    value = str(text).strip().lower()
    if value in ("yes", "true", "on", "1"):
        return True
    if value in ("no", "false", "off", "0"):
        return False
    raise ValueError("expected yes or no")


def _path(text: object) -> str:
    value = os.path.expanduser(str(text))
    if not value.startswith("/"):
        raise ValueError("expected an absolute path")
    # Two leading slashes are a prefix of their own to normpath, and another spelling to nobody.
    return os.path.normpath("/" + value.lstrip("/"))


def _optional_path(text: object) -> str:
    return _path(text) if text else ""


def _store(text: object) -> str:
    value = _path(text)
    if not re.fullmatch(r"[A-Za-z0-9/._+-]+", value):
        raise ValueError(
            "a store's path has only letters, digits and / . _ + - (it ends up in shebang lines)"
        )
    if len(value) > MAX_STORE_BYTES - len("/envs/") - 16:
        raise ValueError(f"a store's path is at most {MAX_STORE_BYTES - 22} bytes long")
    return value


def _optional_store(text: object) -> str:
    return _store(text) if text else ""


def _list(item: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def parse(value: object) -> tuple[Any, ...]:
        items: Iterable[object]
        if value is None:
            raise ValueError("expected a list")
        if isinstance(value, (list, tuple)):
            items = value
        else:
            items = [part for part in str(value).split(":") if part]
        return tuple(item(part) for part in items)

    return parse


def _choice(*names: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if str(value) not in names:
            raise ValueError("expected one of " + ", ".join(names))
        return str(value)

    return parse


def _default_repository() -> str | None:
    """Where environments are published if nothing says where; None for users without a home."""
    data = os.environ.get("XDG_DATA_HOME", "")
    if not data.startswith("/"):  # the specification: relative ones are invalid and ignored
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "stager") if data.startswith("/") else None


class Key(NamedTuple):
    """One configuration key: how it is parsed, its default, and a line of help."""

    parse: Callable[[object], Any]
    default: object
    help: str


KEYS: dict[str, Key] = {
    "store": Key(_store, "/tmp/stager-{uid}", "node-local; {uid} is the user's number"),  # noqa: S108
    "site_store": Key(
        _optional_store,
        "",
        "node-local store owned by root, shared by all users: environments from `repositories`"
        " packed for this path are staged there once, mounted by the kernel; empty: disabled",
    ),
    "repository": Key(_path, None, "where packed environments are published"),
    "repositories": Key(_list(_path), (), "read-only repositories of the site, searched after it"),
    "keep_replaced": Key(parse_duration, 3600.0, "how long a replaced manifest is kept"),
    "stripe_count": Key(
        _between(-1, 2000),
        -1,
        "Lustre storage targets that an image is spread over; -1: all, 0: the directory's default",
    ),
    "local_prefixes": Key(
        _list(_path),
        ("/usr", "/bin", "/sbin", "/lib", "/lib64"),
        "directories that are on every node's own disk: a base Python there is not packed",
    ),
    "pack.format": Key(_choice("squashfs", "tar.zst"), "squashfs", "format of new images"),
    "pack.level": Key(_between(1, 22), 3, "zstd level, 1 to 22"),
    "pack.threads": Key(_between(0, 1024), 0, "threads that compress; 0 is one for each processor"),
    "pack.exclude": Key(
        _list(str), (), "fnmatch patterns of paths inside the environment to leave out"
    ),
    "pack.editables": Key(
        _choice("snapshot", "refuse", "keep"),
        "snapshot",
        "editable installs: include a copy of their source, refuse, or leave them where they are",
    ),
    "pack.links": Key(
        _choice("copy", "refuse", "keep"),
        "copy",
        "links out of its Python directories: copy what they name, refuse, or keep",
    ),
    "pack.module_paths": Key(
        _choice("report", "include"),
        "report",
        "directories in PYTHONPATH and LD_LIBRARY_PATH that are not on the node",
    ),
    "pack.bytecode": Key(_boolean, True, "compile modules that have no valid bytecode"),
    "stage.how": Key(
        _choice("auto", "mount", "extract"), "auto", "how a tree is made usable on a node"
    ),
    "stage.timeout": Key(
        parse_duration, 600.0, "longest wait for another process that stages the same environment"
    ),
    "stage.on_stale": Key(
        _choice("repack", "warn", "fallback", "ignore"),
        "repack",
        "an environment changed since it was packed: pack again, warn, run the original, or do not"
        " look",
    ),
    "stage.sbcast_nodes": Key(
        _integer,
        0,
        "jobs of so many nodes get the image by sbcast instead of each node reading it; 0: none do",
    ),
    "run.strict": Key(
        _boolean, False, "an environment that cannot be staged is an error (exit 125)"
    ),
    "run.user_site": Key(_boolean, False, "let ~/.local/lib/pythonX.Y be imported from"),
    "plan.metadata_rate": Key(
        _between(1, 10**9),
        100_000,
        "metadata operations a second that the shared file system does for all nodes together",
    ),
    "plan.bandwidth": Key(
        parse_size, 100 << 30, "bytes a second that it gives to all nodes of a job together"
    ),
    "collect.max_size": Key(
        parse_size, 50 << 30, "bytes the store may hold before trees are evicted"
    ),
    "collect.min_free": Key(parse_size, 1 << 30, "bytes to leave free on the store's file system"),
    "hook.prolog_wait": Key(
        parse_duration, 10.0, "longest that a Prolog waits; staging goes on after it, to 60s"
    ),
    "hook.deadline": Key(parse_duration, 300.0, "longest staging for a job; its tasks wait"),
    "hook.pack": Key(
        _boolean, True, "the first node of a job packs what is stale or was never packed"
    ),
    "hook.mounts": Key(
        _choice("auto", "visible", "prolog", "never"),
        "auto",
        "mounts that a job sees: all, those made before its Prolog returns, none; auto: ask Slurm's"
        " configuration files",
    ),
    "hook.on_node_fault": Key(
        _choice("ignore", "drain"), "ignore", "whether a broken disk of the store drains the node"
    ),
    "hook.log": Key(_optional_path, "", "file for the hooks' events; syslog where it is empty"),
    "hook.metrics": Key(
        _optional_path, "", "Prometheus textfile (*.prom) with counters of the hooks' events"
    ),
}


class Config:
    """Values by key, and for each where it came from.

    Args:
        uid: the user that ``{uid}`` in the store's path stands for; None is our own.

    Attributes:
        store_template: the store's path as it is written, ``{uid}`` not filled in.
        files: every path that was looked at, and what was there (:func:`stager.warm.identity`).
    """

    def __init__(self, uid: int | None = None) -> None:
        self.uid = os.getuid() if uid is None else uid
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.store_template = ""
        self.files: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def changed(self, values: Mapping[str, Any]) -> Config:
        """The same with other values, parsed already."""
        config = Config(self.uid)
        vars(config).update(vars(self), values={**self.values, **values})
        return config

    def set(self, key: str, value: object, source: str) -> None:
        """Parse and store one value.

        Raises:
            UsageError: the key is unknown or the value malformed; the message names the source.
            OptionError: the value is malformed, and the command line's.
        """
        if key not in KEYS:
            import difflib

            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "`stager config show` lists the keys"
            raise UsageError(f"unknown configuration key `{key}` ({source})", hint=hint, blame=SITE)
        if key == "store":
            self.store_template = str(value)
            value = str(value).replace("{uid}", str(self.uid))
        try:
            self.values[key] = KEYS[key].parse(value)
        except ValueError as error:
            message = f"`{key}` cannot be {value!r} ({source})"
            if source == COMMAND_LINE:
                raise OptionError(message, hint=str(error)) from error
            raise UsageError(message, hint=str(error), blame=SITE) from error
        self.sources[key] = source


def load(
    *,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    trusted_only: bool = False,
    site_directory: str = SITE_DIRECTORY,
    uid: int | None = None,
    cache: str | None = None,
    faults: list[UsageError] | None = None,
) -> Config:
    """Load every value with its provenance.

    Args:
        overrides: values of the command line; None values are skipped.
        environ: the environment; None is the process's own.
        trusted_only: read only the site's files, as root hooks must.
        site_directory: where the site's files are.
        uid: whose store it is; None is our own user.
        cache: a file of root's in which root keeps what the files say.
        faults: takes what is wrong in files and variables; it is left out then.

    Raises:
        UsageError: a file or value is malformed; the message says where.
    """
    environ = os.environ if environ is None else environ
    config = Config(uid)
    for key, entry in KEYS.items():
        default = entry.default if key != "repository" else _default_repository()
        if default is not None:
            config.set(key, default, "default")
    directory = os.path.join(site_directory, "config.d")
    config.files[directory] = warm.identity(directory)
    files = [
        os.path.join(site_directory, "config.yaml"),
        *sorted(glob.glob(os.path.join(glob.escape(directory), "*.yaml"))),
    ]
    if not trusted_only:
        home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        files.append(os.path.join(home, "stager", "config.yaml"))
    if cache:
        _remember(cache)
    before = dict(_parsed)
    for path in files:
        with _put_aside(faults):
            _merge_file(config, path, trusted=trusted_only, faults=faults)
    if cache and _parsed != before:
        _keep(cache)
    if not trusted_only:
        for key in KEYS:
            variable = "STAGER_" + key.upper().replace(".", "_")
            if environ.get(variable):
                with _put_aside(faults):
                    config.set(key, environ[variable], f"${variable}")
    for key, value in (overrides or {}).items():
        if value is not None:
            config.set(key, value, COMMAND_LINE)
    if "repository" not in config.values:
        raise UsageError(
            "there is no home directory for the repository",
            hint="set HOME, or name a repository (STAGER_REPOSITORY, --repository)",
        )
    return config


_parsed: dict[str, tuple[str, Any]] = {}
"""What each file says, and what it was when it was read: one that is as it was is not read again.

Reading YAML takes 50 ms of CPU, most of it for the import: too much for every job on every node.
"""


def _remember(cache: str) -> None:
    """Read what an earlier process kept, if it was root's."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(cache, "rb") as file:
        if _is_roots(file):
            _parsed.update(json.load(file))


def _is_roots(file: BinaryIO) -> bool:
    return os.fstat(file.fileno()).st_uid == 0


def _keep(cache: str) -> None:
    # What is no JSON (a date) is no value of ours either, and will be refused.
    with contextlib.suppress(OSError, TypeError, ValueError):
        data = json.dumps(_parsed).encode()
        fsutil.write_atomic(cache, data, mode=0o644, durable=False)


@contextlib.contextmanager
def _put_aside(faults: list[UsageError] | None) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if faults is None:
            raise
        faults.append(error)


def _merge_file(
    config: Config, path: str, *, trusted: bool, faults: list[UsageError] | None
) -> None:
    try:
        file = open(path, encoding="utf-8", opener=fsutil.regular)  # noqa: SIM115 - below
    except (FileNotFoundError, NotADirectoryError):
        config.files[path] = warm.ABSENT
        return
    except OSError as error:
        is_other = error.errno in (errno.EINVAL, errno.EISDIR)
        raise UsageError(
            f"cannot read the configuration file {path}: {error.strerror}",
            hint="a file belongs there: remove what is in its place"
            if is_other
            else "make it readable; or do HOME and XDG_CONFIG_HOME name somebody else's directory?",
            blame=SITE,
        ) from error
    with file:
        info = os.fstat(file.fileno())
        if trusted and (info.st_uid != 0 or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise UsageError(
                f"the configuration file {path} is writable by users other than root",
                hint=f"chown root:root {path}; chmod 644 {path}",
                blame=SITE,
            )
        identity = config.files[path] = warm.identity_of(info)
        if path not in _parsed or _parsed[path][0] != identity:
            _parsed[path] = (identity, _parse(path, file))
        document = _parsed[path][1]
    if document is None:
        return
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a mapping of keys to values", hint=_YAML, blame=SITE)
    for key, value in _flatten(document):
        with _put_aside(faults):
            config.set(key, value, path)


def _parse(path: str, file: TextIO) -> Any:
    import yaml

    try:
        loader = yaml.SafeLoader(file)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_once(path, node)
        return loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())  # which is of several lines
        raise UsageError(f"{path} is not YAML: {said}", hint=_YAML, blame=SITE) from error


def _require_once(path: str, node: Any) -> None:
    """Refuse a mapping in which a key is twice: YAML's reader would take the last without a word.

    Raises:
        UsageError: one is, or is no text: what is left of a template has braces.
    """
    seen = set()
    for key, value in node.value if node.id == "mapping" else ():
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise UsageError(
                f"{path} has a key that is not a string (line {line})", hint=_YAML, blame=SITE
            )
        if key.value in seen:
            raise UsageError(
                f"{path} has the key `{key.value}` twice (line {line})",
                hint="merge the two sections",
                blame=SITE,
            )
        seen.add(key.value)
        _require_once(path, value)


def _flatten(document: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif value is not None or not any(one.startswith(f"{name}.") for one in KEYS):
            yield name, value  # of a group, all may be commented out
