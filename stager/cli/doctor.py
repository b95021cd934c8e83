"""``stager doctor``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import re
import shutil
import stat
import subprocess

from stager import config as configuration
from stager import fsutil, privilege
from stager.cli.common import load_config, print_json, size
from stager.config import Config
from stager.errors import StagerError
from stager.formats import squashfs
from stager.paths import is_within
from stager.staging import sitestore
from stager.staging.store import Store

OK, WARNING, BAD = "ok", "warning", "error"

_ONE_TARGET = (
    "all nodes together read such an image at the rate of one target (1.7 GB/s, say: 128 nodes wait"
    " 280 s for 3.7 GB)"
)


def doctor(arguments: argparse.Namespace) -> int:
    """Tell what this machine can do; exit 1 where staging cannot work at all."""
    config = load_config(arguments)
    checks = [_python(), _packing(), _mounting(), _extracting()]
    if os.geteuid() == 0:
        checks += [*_configuration(), *_stores(config), *_site_store(config)]
    else:
        checks += _store(config["store"])
    checks += _cleared(config["store"])
    checks += _repository(config["repository"], config["stripe_count"])
    checks += _slurm(config)
    bad = any(verdict == BAD for verdict, _, _ in checks)
    if arguments.json:
        rows = [
            {"verdict": verdict, "what": what, "advice": advice} for verdict, what, advice in checks
        ]
        print_json({"checks": rows})
        return 1 if bad else 0
    for verdict, what, advice in checks:
        print(f"{verdict:<8} {what}")
        if advice:
            print(f"         {advice}")
    return 1 if bad else 0


Check = tuple[str, str, str]


def _python() -> Check:
    libc = " ".join(platform.libc_ver())
    return OK, f"Python {platform.python_version()} on {platform.machine()}, {libc}", ""


def _packing() -> Check:
    try:
        path = squashfs.program("mksquashfs")
    except StagerError as error:
        return WARNING, "cannot write squashfs images: " + error.message, error.hint or ""
    done = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    version = words[2] if len(words) > 2 else "?"
    numbers = tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())
    if numbers < (4, 5):
        return (
            WARNING,
            f"mksquashfs {version} cannot read streams",
            "use --format tar.zst, or 4.5 or newer",
        )
    return OK, f"packs squashfs images (mksquashfs {version})", ""


def _mounting() -> Check:
    reason = squashfs.why_not_mount()
    if reason:
        return (
            WARNING,
            f"cannot mount images: {reason}",
            "trees are extracted instead, which takes longer",
        )
    return OK, "mounts images with squashfuse", ""


def _extracting() -> Check:
    if shutil.which("unsquashfs") is None:
        return (
            WARNING,
            "cannot extract squashfs images: unsquashfs is missing",
            "install squashfs-tools",
        )
    return OK, f"extracts images on {len(os.sched_getaffinity(0))} processors", ""


def _configuration(site_directory: str = configuration.SITE_DIRECTORY) -> list[Check]:
    """Whether hooks take the site's configuration, and users can read it."""
    try:
        files = configuration.load(trusted_only=True, site_directory=site_directory).files
    except StagerError as error:
        return [(BAD, f"hooks refuse it: {error.message}", error.hint or "")]
    closed = [
        path for path in files if os.path.exists(path) and not os.stat(path).st_mode & stat.S_IROTH
    ]
    return [(BAD, f"users cannot read {path}", f"chmod 644 {path}") for path in closed]


def _store(path: str) -> list[Check]:
    place, told = path, f"store {path}"
    if not os.path.lexists(path):  # looking makes none
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
            what = f"the store {path} is not there, and you cannot make it in {place}"
            if place != os.path.dirname(path) or not os.path.isdir(place):
                return [(BAD, what, "name another with --store")]
            advice = "where jobs run hooks make it; elsewhere name another with --store"
            return [(WARNING, what, advice)]
        told += " is made by the first stage"
    else:
        try:
            Store(path)
        except StagerError as error:
            return [(BAD, error.message, error.hint or "")]
    info = os.statvfs(place)
    checks = [(OK, f"{told}: {size(info.f_bavail * info.f_frsize)} free", "")]
    if info.f_flag & os.ST_NOEXEC:
        what = f"{path} is mounted noexec"
        if squashfs.why_not_mount():
            checks.append((BAD, f"{what}, and nothing can be mounted", "name another with --store"))
        else:
            checks.append((WARNING, what, "only mounted images can be used there"))
    if fsutil.is_shared(place):
        what = f"the store {path} is on {fsutil.file_system(place)}"
        advice = "nodes that share it delete each other's trees: choose a local disk"
        checks.append((BAD, what, advice))
    if fsutil.file_system(place) == "tmpfs":
        checks.append(
            (
                WARNING,
                f"{path} is in memory",
                "extracted trees there count against the job's memory",
            )
        )
    return checks


def _cleared(path: str) -> list[Check]:
    """Whether systemd-tmpfiles takes files out of a store that were not read for some time."""
    program = shutil.which("systemd-tmpfiles")
    if program is None:
        return []
    done = subprocess.run([program, "--cat-config"], capture_output=True, text=True, check=False)
    rules = [words for line in done.stdout.splitlines() if len(words := line.split()) > 1]
    place = path
    while place != "/":  # the nearest rule decides, see tmpfiles.d(5)
        for kind, name, *rest in rules:
            if kind[0] not in "dDevqQx" or not fnmatch.fnmatchcase(place, name):
                continue
            age = rest[3] if len(rest) > 3 and kind[0] != "x" else "-"
            if age == "-":
                return []
            what = f"systemd-tmpfiles takes files out of {path} that were not read for {age}"
            return [(WARNING, what, f"add `x {path}` to /etc/tmpfiles.d/stager-store.conf")]
        place = os.path.dirname(place)
    return []


def _repository(path: str, count: int) -> list[Check]:
    """Over how much of Lustre images are spread; nothing where the repository is not on it."""
    from stager.packing import lustre

    if not lustre.is_on(path):
        return []
    what = f"the repository {path} is on Lustre"
    if not lustre.has_tool():
        return [(WARNING, f"{what}, and lfs is not installed here: {_ONE_TARGET}", "install lfs")]
    checks: list[Check] = []
    default = lustre.count_of(path)
    told = "has an unknown stripe count" if default is None else f"has stripe count {default}"
    if count == 0 and default in (None, 1):
        advice = "set the key `stripe_count` to -1, and pack again"
        checks.append((WARNING, f"{what}, and its directory {told}: {_ONE_TARGET}", advice))
    elif count == 0:
        checks.append((OK, f"{what}; its directory {told}, and images with it", ""))
    else:
        over = "all storage targets" if count == -1 else f"{count} storage targets"
        checks.append((OK, f"{what}; new images are spread over {over} (its directory {told})", ""))
    images = os.path.join(path, "images")
    narrow = [
        name
        for name in sorted(os.listdir(images) if os.path.isdir(images) else ())
        if _is_narrow(os.path.join(images, name))
    ]
    if narrow:
        checks.append(
            (
                WARNING,
                f"{len(narrow)} of its images lie on one storage target: {_ONE_TARGET}",
                f"lfs migrate -c {count or -1} {os.path.join(images, narrow[0])}"
                + (" ..." if len(narrow) > 1 else ""),
            )
        )
    return checks


def _is_narrow(image: str) -> bool:
    from stager.packing import lustre

    try:
        return os.path.getsize(image) >= lustre.SMALL and lustre.count_of(image) == 1
    except OSError:  # a link to what its own repository has removed
        return False


def _site_store(config: Config) -> list[Check]:
    """Whether root can stage for all users; nothing where that is not configured."""
    path = config["site_store"]
    if not path:
        return []
    try:
        sitestore.require_trusted(path if os.path.lexists(path) else os.path.dirname(path))
    except StagerError as error:
        return [(BAD, f"the site's store {path}: {error.message}", error.hint or "")]
    checks = [(OK, f"the site's store {path}: trees are mounted by the kernel", "")]
    if not _kernel_mounts():
        lacking = "this kernel has no squashfs, or there are no loop devices"
        checks = [(WARNING, f"the site's store {path}: trees are extracted: {lacking}", "")]
    if not config["repositories"]:
        checks.append((WARNING, "no repository publishes for it", "set the key `repositories`"))
    for repository in config["repositories"]:
        try:
            sitestore.require_trusted(repository)
        except StagerError as error:
            what = f"nothing of {repository} is staged there: {error.message}"
            checks.append((WARNING, what, error.hint or ""))
    return checks


def _kernel_mounts() -> bool:
    """Whether the kernel has squashfs, built in or as a module, and devices to mount files by."""
    if not os.path.exists("/dev/loop-control"):
        return False
    with open("/proc/filesystems", encoding="ascii") as file:
        if "\tsquashfs\n" in file.read():
            return True
    loader = shutil.which("modprobe")
    if loader is None:
        return False
    asked = [loader, "-n", "-q", "squashfs"]
    return subprocess.run(asked, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _stores(config: Config) -> list[Check]:
    """What root can say about the stores of all users."""
    template = config.store_template
    parent = os.path.dirname(template)
    try:
        directory = privilege.trusted_directory(parent)
    except OSError as error:
        return [
            (BAD, f"{parent} cannot be used: {error.strerror}", "root has to make it: mode 755")
        ]
    if directory is None:
        what = (
            f"users other than root can write to {parent} or a directory above it, or its"
            " path contains a symbolic link"
        )
        advice = f"hooks make no store there: set the key `store` to {_ADVISED}, without links"
        return [(WARNING, what, advice)]
    os.close(directory)
    free = os.statvfs(parent)
    return [(OK, f"stores {template}: {size(free.f_bavail * free.f_frsize)} free", "")]


# -- Slurm -----------------------------------------------------------------------------------

_ADVISED = "/var/lib/stager/{uid}"
_HOOKS = ("Prolog", "Epilog", "TaskProlog")
_EPILOG = 15.0
"""Seconds: 3 for each of the three processes that staging may have, 6 for the claims in a store."""
_IMPLY_ALLOC = {"alloc", "contain", "nohold", "x11", "runinjob", "forcerequeueonfail"}


def _slurm(config: Config) -> list[Check]:
    """Whether the hooks and Slurm's configuration fit together; nothing where there is no Slurm."""
    if shutil.which("scontrol") is None:
        return []
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [(WARNING, "Slurm's controller does not answer", "")]
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        return [(WARNING, "cannot read Slurm's configuration", said[-1] if said else "")]
    settings = slurm_settings(done.stdout)
    return [*_hooks(settings), *_timing(settings, config), *_private(settings, config)]


def slurm_settings(text: str) -> dict[str, list[str]]:
    """Parse ``scontrol show config``; keys in lower case. Since 24.11 some are ``Prolog[0]``."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\w+)(?:\[\d+\])?\s*=\s*(.*?)\s*$", line)
        if match and match[2] not in ("(null)", ""):
            found.setdefault(match[1].lower(), []).append(match[2])
    return found


def _one(settings: dict[str, list[str]], key: str) -> str:
    return settings.get(key.lower(), [""])[0]


def _hooks(settings: dict[str, list[str]]) -> list[Check]:
    checks: list[Check] = []
    version = _one(settings, "SLURM_VERSION")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (22, 5):
        checks.append(
            (
                BAD,
                f"Slurm {version} does not pass the job comment to the Prolog",
                "22.05 or newer is needed",
            )
        )
    for hook in _HOOKS:
        paths = settings.get(hook.lower(), [])
        gone = [path for path in paths if "*" not in path and not os.path.exists(path)]
        if gone:
            effect = "fails every task" if hook == "TaskProlog" else "drains the node"
            checks.append((BAD, f"{hook}={gone[0]} is missing here, which {effect}", ""))
        elif not any("stager" in path or "*" in path for path in paths):
            checks.append((WARNING, f"{hook} is not stager's", "see deploy/install for the lines"))
    flags = {flag.lower() for flag in _one(settings, "PrologFlags").split(",")}
    if not flags & _IMPLY_ALLOC:
        checks.append(
            (
                WARNING,
                "without PrologFlags=Alloc staging starts with the first step on a node",
                "set PrologFlags=Alloc",
            )
        )
    if "nohold" in flags:
        checks.append(
            (WARNING, "with PrologFlags=NoHold a slow Prolog fails srun", "use Alloc instead")
        )
    if "test_exec" in _one(settings, "LaunchParameters").lower():
        checks.append(
            (WARNING, "LaunchParameters=test_exec looks for `python` before TaskProlog ran", "")
        )
    return checks or [(OK, f"Slurm {version} runs the hooks", "")]


def _seconds(text: str) -> float | None:
    """A number of seconds as scontrol prints it; None for none (65534 is Slurm's NO_VAL16)."""
    match = re.match(r"(\d+)", text)
    return float(match[1]) if match and match[1] != "65534" else None


def _timing(settings: dict[str, list[str]], config: Config) -> list[Check]:
    wait = config["hook.prolog_wait"]
    limit = _seconds(_one(settings, "PrologTimeout") or _one(settings, "PrologEpilogTimeout"))
    if limit and wait + 5 > limit:
        return [
            (
                BAD,
                f"Slurm ends a Prolog after {limit:.0f} s and drains the node then; ours waits"
                f" {wait:.0f} s (hook.prolog_wait)",
                "set hook.prolog_wait to 10 s less than Slurm's limit",
            )
        ]
    limit = _seconds(_one(settings, "EpilogTimeout") or _one(settings, "PrologEpilogTimeout"))
    if limit and limit < _EPILOG + 5:
        return [
            (
                BAD,
                f"Slurm ends an Epilog after {limit:.0f} s and drains the node then; ours may take"
                f" {_EPILOG:.0f} s where storage hangs",
                f"a limit of {_EPILOG + 5:.0f} s or more will do",
            )
        ]
    message = _seconds(_one(settings, "MessageTimeout")) or 10
    start = _seconds(_one(settings, "BatchStartTimeout")) or 10
    flags = _one(settings, "PrologFlags").lower()
    if "deferbatch" not in flags and wait + 5 > message + start:
        return [
            (
                BAD,
                f"srun gives up after {message + start:.0f} s while another node's Prolog runs;"
                f" ours waits {wait:.0f} s (hook.prolog_wait)",
                "lower hook.prolog_wait, or add DeferBatch to PrologFlags",
            )
        ]
    return []


def _private(settings: dict[str, list[str]], config: Config) -> list[Check]:
    """Directories that every job has for itself, where nothing staged before it can be seen."""
    from stager.hooks import slurm as hook

    kind = _one(settings, "JobContainerType") or _one(settings, "NamespaceType")
    if not re.search(r"tmpfs|linux", kind):
        return []
    path = _one(settings, "SLURM_CONF")
    text = hook.slurm_config(path) or ""
    keys = dict(re.findall(r"^\s*(\w+)\s*=\s*(\S+)", text, re.MULTILINE))
    keys = {key.lower(): value for key, value in keys.items()}
    private = [one for one in keys.get("dirs", "/tmp,/dev/shm").split(",") if one]  # noqa: S108
    store = config.store_template
    for one in (*private, keys.get("basepath", "")):
        if one and is_within(store, [one]):
            return [
                (
                    BAD,
                    f"the store {store} cannot be seen by jobs: each has its own {one} ({kind})",
                    f"set the key `store` to {_ADVISED} or another local directory",
                )
            ]
    if keys.get("shared", "").lower() == "true":
        return [(OK, f"jobs have a private {private[0]}, and see the store {store}", "")]
    return [
        (
            OK,
            f"jobs have a private {private[0]}, and see the store {store}, but no mount that is"
            " made after their Prolog",
            "a tree that takes longer than hook.prolog_wait is extracted then; Shared=true in"
            " job_container.conf (Slurm 23.02 and newer) lets it be mounted",
        )
    ]
