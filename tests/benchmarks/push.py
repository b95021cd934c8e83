"""How long a push takes: from here to each node, and by way of the nodes.

    .venv/bin/python tests/benchmarks/push.py [NODES] [MIB] [RATE]

Nodes are namespaces of this machine (see ``tests/push/lab.py``); every link is limited to RATE (as
in ``200mbit``) in each direction with tc-tbf(8). All share this machine's processors, which
encrypt and decrypt for all of them: with a rate that they can keep up with, the links decide. As
root.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    count, mib, rate = 4, 64, "200mbit"
    given = sys.argv[1:]
    if given:
        count = int(given[0])
    if len(given) > 1:
        mib = int(given[1])
    if len(given) > 2:
        rate = given[2]
    root = Path(tempfile.mkdtemp(prefix="push-"))
    root.chmod(0o755)
    os.environ["HOME"], os.environ["TMPDIR"] = str(root), str(root)
    from push.conftest import pack
    from push.lab import Lab

    lab = Lab(root / "lab", count)
    try:
        pack(lab, ballast=mib << 20)
        lab.limit(rate)
        taken = {}
        for name, options in (("flat", ()), ("tree", ("--tree=2",)), ("chain", ("--tree=1",))):
            started = time.monotonic()
            said = lab.push(*options)
            taken[name] = time.monotonic() - started
            sent = sum(one["sent"] for one in said["nodes"].values() if not one["via"])
            print(
                f"{name:6} {count} nodes, {mib} MiB, {rate}: {taken[name]:6.1f} s;"
                f" {sent >> 20} MiB left the login host"
            )
            for node in lab.nodes:
                lab.on(node, "collect", "--all")
        print(f"flat / tree: {taken['flat'] / taken['tree']:.2f}")
    finally:
        lab.close()
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
