"""Stands in for pbs_python: runs a hook file once, with a module ``pbs`` made of what is told.

What the module does is what was measured on OpenPBS 23.06 (docs/pbs.md): a resource that is not
there is None; ``reject`` and ``accept`` raise SystemExit; attributes that an event does not have
raise; the value of a variable ends at a comma that is not escaped. Standard input has one JSON
object: ``event``, ``node``, ``nodes`` of the job, ``vnodes``, what the names of vnodes have behind
those of their hosts, ``job``, ``job_list``, ``config``, ``hook``. Standard output gets
what came of it; standard error is whatever the hook's would be.
"""

from __future__ import annotations

import json
import re
import sys
import types
from typing import Any

EVENTS = (
    "QUEUEJOB", "MODIFYJOB", "EXECJOB_BEGIN", "EXECJOB_PROLOGUE", "EXECJOB_PRETERM",
    "EXECJOB_EPILOGUE", "EXECJOB_ABORT", "EXECHOST_PERIODIC",
)  # fmt: skip
SERVER = ("QUEUEJOB", "MODIFYJOB")


class Variables(dict):  # type: ignore[type-arg]
    """A Variable_List: a hook's value becomes one string with all others, parted by commas."""

    def __setitem__(self, name: str, value: object) -> None:
        if not isinstance(value, str):
            raise TypeError("Variable_List values are strings")
        if name.startswith("PBS_") or name == "TMPDIR":
            raise ValueError(f"env variable '{name}' is readonly")
        first, *rest = re.split(r"(?<!\\),", value)
        super().__setitem__(name, first)
        for one in rest:
            key, _, more = one.partition("=")
            super().__setitem__(key, more)

    def told(self) -> dict[str, str]:
        """As a task has them."""
        return {key: value.replace("\\,", ",") for key, value in self.items()}


class Resources(dict):  # type: ignore[type-arg]
    """A Resource_List: where there is no such resource it is None; one that nobody made fails."""

    def __init__(self, values: dict[str, Any], known: bool) -> None:
        super().__init__(values)
        self.known = known

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def __setitem__(self, name: str, value: object) -> None:
        if name == "pyenv" and not self.known:
            raise KeyError(f"resource attribute '{name}' not found")
        super().__setitem__(name, value)


class Job:
    """The job object: what one event shows of it."""

    def __init__(self, told: dict[str, Any], event: str) -> None:
        self.id = told["id"] if event != "QUEUEJOB" else ""
        self.euser = told.get("euser") if event not in SERVER else None
        self.run_count = told.get("run_count")
        self.exec_host2 = told.get("exec_host2") if event not in SERVER else None
        self.Variable_List = Variables(told.get("variables", {}))
        self.Resource_List = Resources(told.get("resources", {}), told.get("known", True))
        self.done: list[str] = []
        self._first = bool(told.get("first"))
        if event in SERVER:
            self.in_ms_mom = None  # type: ignore[assignment]

    def in_ms_mom(self) -> bool:
        return self._first

    def delete(self) -> None:
        self.done.append("delete")

    def rerun(self) -> None:
        self.done.append("rerun")


def main() -> None:
    told = json.load(sys.stdin)
    name = told["event"]
    outcome: dict[str, Any] = {"accepted": True, "log": []}
    vnode = types.SimpleNamespace(state="free", comment=None)
    other = types.SimpleNamespace(state="free", comment=None)

    event = types.SimpleNamespace(type=name)
    if name == "EXECHOST_PERIODIC":
        event.job_list = dict.fromkeys(told.get("job_list", []))
    else:
        event.job = Job(told["job"], name)
    if name not in SERVER:
        names = {one: one + told["vnodes"] for one in told["nodes"]}
        event.vnode_list = {
            names.pop(told["node"], ""): vnode,
            **dict.fromkeys(names.values(), other),
        }

    def end(accepted: bool, message: str = "") -> None:
        outcome.update(accepted=accepted, message=message)
        raise SystemExit

    event.accept = lambda: end(True)
    event.reject = lambda message="": end(False, message)

    pbs: Any = types.ModuleType("pbs")
    for one in EVENTS:
        setattr(pbs, one, one)
    pbs.event = lambda: event
    pbs.ND_OFFLINE = "offline"
    pbs.LOG_WARNING = 4
    pbs.logmsg = lambda level, text: outcome["log"].append(text)
    pbs.get_local_nodename = lambda: told["node"]
    pbs.hook_config_filename = told.get("config")
    sys.modules["pbs"] = pbs

    with open(told["hook"], encoding="utf-8") as file:
        code = compile(file.read(), "<embedded code object>", "exec", optimize=2)
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        pass
    except BaseException as error:  # what PBS calls a hook error
        outcome.update(accepted=False, message=f"hook error: {type(error).__name__}: {error}")
    if name != "EXECHOST_PERIODIC":
        outcome["variables"] = dict(event.job.Variable_List)
        outcome["environ"] = event.job.Variable_List.told()
        outcome["resources"] = dict(event.job.Resource_List)
        outcome["done"] = event.job.done
    outcome.update(vnode=vars(vnode), other=vars(other))
    json.dump(outcome, sys.stdout)


main()
