"""What the peers and ours do between a job's start and its ranks' imports, as their users type it.

Every command runs as the user on the nodes of an allocation; ``$PFS`` is on the shared file system,
``/tmp`` is each node's own.
"""

from __future__ import annotations

from dataclasses import dataclass

PFS = "/home/pfs"
"""What is on the shared file system: the environment, its archives, the repositories."""
LOCAL = "/tmp/bench"
RANKS = 8
"""Of each node, and as many processors."""
IMAGE_NAME, ARCHIVE_NAME, SITE_NAME = "bench", "bench-tar", "bench-site"


@dataclass(frozen=True)
class Phase:
    """One command.

    Attributes:
        name: what it is for.
        command: a line of sh.
        ranks: processes on each node; 0 runs it once, as a batch script does.
        nodes: ``all``, ``first`` or ``others`` of the allocation.
        programs: that work at the same time in each process of the phase, as those of a pipe do.
    """

    name: str
    command: str
    ranks: int = 1
    nodes: str = "all"
    programs: int = 1

    def processes(self, nodes: int) -> int:
        """How many work at the same time on so many nodes: each has a processor of its own."""
        return max(1, self.ranks) * self.programs * nodes


@dataclass(frozen=True)
class Strategy:
    """A way to start.

    Attributes:
        name: what it is called.
        phases: what is done, one after the other.
        comment: of the job: what the Prolog stages.
        warm: the environment is staged already.
        daemon: the first node serves files to the others.
        data: what of the shared directory it reads more of than names.
    """

    name: str
    phases: tuple[Phase, ...]
    comment: str = ""
    warm: bool = False
    daemon: bool = False
    data: str = "env"


def _import(python: str, modules: str, ranks: int, *, before: str = "") -> Phase:
    first = modules.split(",", maxsplit=1)[0]
    code = f"import time, {modules}; print('imported', time.time(), {first}.__file__)"
    return Phase("import", f'{before}{python} -c "{code}"', ranks=ranks)


def strategies(
    modules: str, stager: str, *, ranks: int = RANKS, conda: bool = False
) -> list[Strategy]:
    """All of them.

    Args:
        modules: what each rank imports, as in ``torch,scipy``.
        stager: the directory of the installed programs.
        ranks: how many of them a node has.
        conda: conda-pack made the archive, whose script repairs what was unpacked; venv-pack2 has
            none.
    """
    unpack = Phase("unpack", f"PATH={LOCAL}/bin:$PATH conda-unpack")
    repaired = (unpack,) if conda else ()
    local = _import(f"{LOCAL}/bin/python", modules, ranks)
    # The first rank of a node mounts, the others wait for it: mounts end with their step.
    mount = (
        f"mkdir -p {LOCAL}; [ $SLURM_LOCALID != 0 ] || squashfuse_ll {PFS}/env.squashfs {LOCAL}; "
        f"until [ -e {LOCAL}/bin/python ]; do sleep 0.05; done; "
    )
    ours = _import("python", modules, ranks)
    return [
        Strategy("direct", (_import(f"{PFS}/env/bin/python", modules, ranks),)),
        Strategy(  # as sites have it
            "recipe",
            (
                Phase("sbcast", f"sbcast --force {PFS}/env.tar.gz /tmp/bench.tar.gz", ranks=0),
                Phase("mkdir", f"mkdir {LOCAL}"),
                Phase(
                    "untar",
                    f"tar --use-compress-program=pigz -xf /tmp/bench.tar.gz -C {LOCAL}",
                    programs=2,
                ),
                *repaired,
                local,
            ),
            data="env.tar.gz",
        ),
        Strategy("cp -r", (Phase("copy", f"cp -r {PFS}/env {LOCAL}"), local)),
        Strategy(  # one reader, the others from it: as `ezpz yeet` does for up to eight nodes
            "rsync",
            (
                Phase(
                    "read",
                    f"cp {PFS}/env.tar.gz /tmp/bench.tar.gz; mkdir {LOCAL}; "
                    f"tar -xzf /tmp/bench.tar.gz -C {LOCAL}",
                    nodes="first",
                    programs=2,
                ),
                Phase(  # one that sends, one that receives
                    "rsync",
                    f"rsync -rlpt rsync://$FIRST:8730/bench/ {LOCAL}/",
                    nodes="others",
                    programs=2,
                ),
                *repaired,
                local,
            ),
            daemon=True,
            data="env.tar.gz",
        ),
        Strategy(
            "squashfs in place",
            (_import(f"{LOCAL}/bin/python", modules, ranks, before=mount),),
            data="env.squashfs",
        ),
        Strategy("ours", (ours,), comment=f"pyenv:{IMAGE_NAME}", data="repository"),
        # What cli_filter.lua makes of the same directive when the job is submitted.
        Strategy(
            "ours, checked",
            (ours,),
            comment=f"pyenv:{IMAGE_NAME}?on_stale=ignore",
            data="repository",
        ),
        # The same, published by the site for all users: mounted by the kernel.
        Strategy("ours, site", (ours,), comment=f"pyenv:{SITE_NAME}", data="site"),
        Strategy("ours, tar.zst", (ours,), comment=f"pyenv:{ARCHIVE_NAME}", data="repository"),
        Strategy(
            "ours, sbcast",
            (
                Phase(
                    "activate",
                    f"{stager}/stager activate --via sbcast {IMAGE_NAME} >~/activation.sh",
                    ranks=0,
                ),
                _import("python", modules, ranks, before=". ~/activation.sh; "),
            ),
            data="repository",
        ),
        Strategy(
            "ours, warm", (ours,), comment=f"pyenv:{IMAGE_NAME}", warm=True, data="repository"
        ),
    ]
