"""The scheduler hooks' Python, run as root: ``stager hook VERB``.

::

    Slurm   hooks/slurm/prolog, epilog      -> prolog, store, epilog stager/hooks/slurm.py
    PBS     hooks/pbs/stager_hook.py        -> pbs-begin, pbs-...    stager/hooks/pbs.py

A hook never keeps a job hostage. It starts a worker that survives it (see
:mod:`stager.hooks.worker`), waits a short bounded time and returns; the job's tasks wait for the
rest. The worker has a child become the user, see :mod:`stager.hooks.forjob`, writes down what that
says, see :mod:`stager.jobstate`, and gives up after ``hook.deadline``.

This is the only code that fails open: whatever happens, the status is 0 and the job runs, unless
it asked for ``strict``: that is written down first, and its tasks end themselves. Only where the
site chose ``hook.on_node_fault: drain`` and root itself cannot write beside the store is the status
another one. No Prolog or Epilog asks a scheduler anything; what clears up by the clock does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from stager import jobstate


def main(argv: Sequence[str]) -> int:
    """Run one hook.

    Args:
        argv: the verb, and optionally where job states are kept.

    Returns:
        0; or what the shim makes a fault of the node.
    """
    if not argv:
        return 2
    os.umask(0o022)
    root = argv[1] if len(argv) > 1 else jobstate.ROOT
    if argv[0].startswith("pbs-"):
        from stager.hooks import pbs

        return pbs.main(argv[0][len("pbs-") :], root)
    from stager.hooks import slurm

    verbs = {"prolog": slurm.prolog, "store": slurm.store, "epilog": slurm.epilog}
    return verbs[argv[0]](os.environ, root) if argv[0] in verbs else 2
