"""Plays what a real PBS did, event by event, on the hosts of a cluster.

``recordings.json`` holds the events of jobs on OpenPBS 23.06 with four hosts: which, on which node,
in which order, with which run. Each is given to the hook by :mod:`pbs.stand_in` on the host of that
name, and what the hook sets is there in the events that follow, as PBS does it. Between the last
prologue and the first event of the end the job's tasks run, on all its nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import REPO
from slurm.site import Site

HERE = Path(__file__).resolve().parent
RECORDINGS: dict[str, Any] = json.loads((HERE / "recordings.json").read_text())
CONFIG = "/etc/stager/pbs.json"
PROFILE = "/usr/libexec/stager/profile.d"
SHOW = "import os, sys; print(os.uname().nodename, sys.prefix, os.path.realpath(sys.prefix))"
_ENDS = ("execjob_preterm", "execjob_epilogue", "execjob_abort")


@dataclass
class Task:
    """What a task on one node printed, and how it ended."""

    node: str
    status: int
    out: str
    err: str

    @property
    def prefix(self) -> tuple[str, str]:
        """The prefix that :data:`SHOW` printed, and where it leads."""
        _, prefix, real = self.out.split()
        return prefix, real


@dataclass
class Played:
    """A job."""

    site: Site
    events: list[dict[str, Any]]
    pyenv: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    script: str = f'python -c "{SHOW}"'
    meanwhile: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    """Done before the first event of a name on a node: ``execjob_preterm n1``."""
    known: bool = True
    """Whether the site has the resource."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    domain: str = ""
    """What the server's names of hosts have, and those of moms do not."""
    vnodes: str = ""
    """The same of vnodes."""
    runs: list[list[Task]] = field(default_factory=list)
    output: str = ""
    """What hooks said to the user."""

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the last run."""
        return self.runs[-1]

    def rejected(self) -> list[tuple[str, str, list[str]]]:
        """Event, node, and what was done to the job, where the hook rejected."""
        pairs = zip(self.events, self.outcomes)
        return [(e["event"], e["node"], o["done"]) for e, o in pairs if not o["accepted"]]

    def logged(self) -> list[str]:
        """What hooks wrote to the log of PBS."""
        return [text for outcome in self.outcomes for text in outcome["log"]]

    def play(self) -> Played:
        """All events, and the tasks of every run that came to have any."""
        ran: set[tuple[str, int]] = set()
        waiting: Future[dict[str, Any]] | None = None
        done = set()
        with ThreadPoolExecutor(1) as pool:
            for number, event in enumerate(self.events):
                name = f"{event['event']} {event['node']}"
                if name in self.meanwhile and name not in done:
                    done.add(name)
                    self.meanwhile[name]()
                run = (event.get("id", ""), event.get("run_count", 0))
                if event["event"] in _ENDS and run not in ran and waiting is None:
                    ran.add(run)
                    if self._started(run):
                        self._run_tasks(run)
                following = self.events[number + 1 : number + 2]
                # Deleted while the first node's prologue waits: the two run at the same time.
                concurrent = event["event"] == "execjob_prologue" and any(
                    one["event"] == "execjob_preterm" and one["node"] == event["node"]
                    for one in following
                )
                if concurrent and event.get("in_ms_mom"):
                    waiting = pool.submit(self._one, dict(event))
                    self.outcomes.append({})
                    continue
                self.outcomes.append(self._one(event))
                if waiting is not None:
                    self.outcomes[number - 1] = waiting.result()
                    ran.add(run)
                    waiting = None
        return self

    def _started(self, run: tuple[str, int]) -> bool:
        """Whether this run's script was started: the first node's prologue accepted."""
        for event, outcome in zip(self.events, self.outcomes):
            mine = (event.get("id"), event.get("run_count")) == run
            if mine and event["event"] == "execjob_prologue" and event.get("in_ms_mom"):
                return bool(outcome["accepted"])
        return False

    def _nodes(self, run: tuple[str, int]) -> list[str]:
        found = []
        for event in self.events:
            mine = (event.get("id"), event.get("run_count")) == run
            if mine and event["event"] == "execjob_begin" and event["node"] not in found:
                found.append(event["node"])
        return found

    def _run_tasks(self, run: tuple[str, int]) -> None:
        tasks = []
        for node in self._nodes(run):
            environ = {"PATH": "/bin:/usr/bin", **self._shown(), "PBS_JOBID": run[0]}
            pairs = [f"{key}={value}" for key, value in environ.items()]
            argv = ["env", "-i", *pairs, "sh", "-c", self.script]
            done = self.site.cluster.exec(node, "alice", argv, check=False)
            tasks.append(Task(node, done.returncode, done.stdout, done.stderr))
        self.runs.append(tasks)

    def _shown(self) -> dict[str, str]:
        return {key: value.replace("\\,", ",") for key, value in self.variables.items()}

    def _one(self, event: dict[str, Any]) -> dict[str, Any]:
        """One event."""
        name = event["event"]
        if name == "queuejob":
            self.variables = {**event.get("variables", {}), **self.variables}
        resources = {"pyenv": self.pyenv} if self.pyenv else {}
        nodes = self._nodes((event.get("id", ""), event.get("run_count", 0)))
        told = {
            "event": name.upper(),
            "node": event["node"],
            "job": {
                "id": event.get("id", ""),
                "euser": "alice",
                "run_count": event.get("run_count"),
                "first": event.get("in_ms_mom", False),
                "variables": self.variables,
                "resources": resources,
                "known": self.known,
                "exec_host2": "+".join(f"{one}{self.domain}:15002/0*2" for one in nodes),
            },
            "job_list": event.get("jobs", []),
            "nodes": nodes,
            "vnodes": self.vnodes,
            "config": CONFIG,
            "hook": str(REPO / "hooks/pbs/stager_hook.py"),
        }
        host = "ctl" if event["node"] == "head" else event["node"]
        argv = ["/usr/bin/python3", "-I", "-S", "-B", str(HERE / "stand_in.py")]
        argv = ["env", "-i", "PATH=/bin:/usr/bin", *argv]
        done = self.site.cluster.exec(host, "root", argv, input=json.dumps(told))
        outcome: dict[str, Any] = json.loads(done.stdout)
        if name == "execjob_prologue" and event.get("in_ms_mom"):
            self.output += done.stderr
        else:
            assert done.stderr == "", done.stderr  # nobody would see it
        if name in ("queuejob", "modifyjob") or (
            name == "execjob_begin" and event.get("in_ms_mom")
        ):
            self.variables = outcome["variables"]
            self.pyenv = outcome["resources"].get("pyenv") or ""
        elif "variables" in outcome:
            assert outcome["variables"] == self.variables, f"{name} changed the job"
        return outcome


def play(site: Site, recording: str, pyenv: str = "", **more: Any) -> Played:
    """Play one recording."""
    events = RECORDINGS[recording]["events"]
    return Played(site, list(events), pyenv, **more).play()


def login_shell(site: Site, node: str, job: Played, script: str) -> str:
    """What a job's login shell prints, which has made PATH anew."""
    environ = {**job._shown(), "PATH": "/usr/local/bin:/usr/bin:/bin", "PBS_JOBID": "1.head"}
    argv = ["env", "-i", *(f"{key}={value}" for key, value in environ.items())]
    argv += ["sh", "-c", f". {PROFILE}/zz-stager.sh; {script}"]
    return site.cluster.exec(node, "alice", argv).stdout.strip()


def of_run(job: Played, number: int) -> Iterator[str]:
    """Where the tasks of one run had their Python."""
    return (os.path.dirname(task.prefix[1]) for task in job.runs[number])
