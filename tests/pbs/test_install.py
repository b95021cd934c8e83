"""hooks/pbs/install against a qmgr that minds its grammar, and keeps what it is told in files."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments import REPO

# What qmgr(8B) of OpenPBS 23.06 says and does for what is asked of it here.
QMGR = r"""
import json, os, re, sys
home = os.environ["FAKE_PBS"]
state = json.load(open(home + "/state.json"))
def fail(text):
    print("qmgr: " + text, file=sys.stderr)
    sys.exit(1)
def pending(hook, action):
    with open(home + "/home/server_priv/hooks/tracking.TR", "a") as file:
        for mom in ("n1", "n2"):
            file.write(f"{mom}:15002 {hook} {action} 7\n")
if sys.argv[1:2] != ["-c"] or len(sys.argv) != 3:
    fail("usage: qmgr -c COMMAND")
line = sys.argv[2]
with open(home + "/log", "a") as log:
    log.write(line + "\n")
events = {"queuejob", "modifyjob", "execjob_begin", "execjob_prologue", "execjob_preterm",
          "execjob_epilogue", "execjob_abort", "exechost_periodic", "execjob_launch", "execjob_end"}
NAME = r"[A-Za-z][A-Za-z0-9_.-]*"
m = re.fullmatch(rf"(create|delete) (resource|hook) ({NAME})(?: (.+))?", line)
s = re.fullmatch(rf"set (hook|resource) ({NAME}) (\w+) ?= ?(?:\"([^\"]*)\"|(\S+))", line)
l = re.fullmatch(rf"list (hook|resource) ({NAME})", line)
kinds = "application/x-python|application/x-config"
i = re.fullmatch(rf"import hook ({NAME}) ({kinds}) default (\S+)", line)
if m and m[1] == "create":
    kind, name = state[m[2]], m[3]
    if name in kind:
        fail(f"Error (15{'185' if m[2] == 'resource' else '157'}) returned from server")
    values = dict(pair.split("=", 1) for pair in (m[4] or "").split(",") if pair)
    types = ("string", "long", "float", "boolean", "size")
    if m[2] == "resource" and values.get("type") not in types:
        fail("Invalid value for attribute")
    kind[name] = values if m[2] == "resource" else {"enabled": "true", "event": "", "alarm": "30"}
    pending("resourcedef" if m[2] == "resource" else name, 8)
elif m:
    if m[3] not in state[m[2]] or m[4]:
        fail("Unknown " + m[2])
    if m[2] == "resource" and state.get("jobs"):
        fail("Resource busy on job")
    del state[m[2]][m[3]]
    pending(m[3], 16)
elif s:
    if s[2] not in state[s[1]]:
        fail("hook not found")
    value = s[4] if s[4] is not None else s[5]
    if s[3] == "event" and not set(value.split(",")) <= events:
        fail("invalid event")
    if s[3] in ("alarm", "order") and not value.isdigit():
        fail("Illegal attribute or resource value")
    if s[3] == "order" and not 1 <= int(value) <= 1000:
        fail("order out of range")
    if s[3] == "enabled" and value not in ("true", "false"):
        fail("unexpected value")
    if s[3] not in ("event", "alarm", "order", "enabled", "fail_action", "freq", "type", "flag"):
        fail("Undefined attribute")
    state[s[1]][s[2]][s[3]] = value
elif l:
    if l[2] not in state[l[1]]:
        fail("Unknown")
    print(("Hook " if l[1] == "hook" else "Resource ") + l[2])
    for key, value in state[l[1]][l[2]].items():
        print(f"    {key} = {value}")
elif i:
    if i[1] not in state["hook"]:
        fail("hook not found")
    text = open(i[3]).read()
    if i[2].endswith("python"):
        compile(text, i[3], "exec")
    state["hook"][i[1]]["script" if i[2].endswith("python") else "config"] = text
    pending(i[1], 3)
else:
    fail("Syntax error: " + line)
json.dump(state, open(home + "/state.json", "w"))
if not state.get("stuck"):  # the moms have it at once
    with open(home + "/home/server_priv/hooks/tracking.TR", "a") as file:
        for mom in ("n1", "n2"):
            for hook in ("stager", "resourcedef"):
                file.write(f"{mom}:15002 {hook} 0 7\n")
"""


@dataclass(frozen=True)
class Server:
    """A PBS server as far as the installer sees it."""

    root: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(REPO / "hooks/pbs/install"), *arguments],
            env={
                "PATH": f"{self.root}/bin:/usr/bin:/bin",
                "PBS_CONF_FILE": str(self.root / "pbs.conf"),
                "FAKE_PBS": str(self.root),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def state(self) -> dict[str, dict[str, dict[str, str]]]:
        import json

        value: dict[str, dict[str, dict[str, str]]] = json.loads(
            (self.root / "state.json").read_text()
        )
        return value

    def change(self, **values: object) -> None:
        import json

        (self.root / "state.json").write_text(json.dumps({**self.state, **values}))

    def said(self) -> list[str]:
        return (self.root / "log").read_text().splitlines()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    for directory in ("bin", "home/server_priv/hooks", "home/mom_priv"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "pbs.conf").write_text(f"PBS_EXEC=/nonexistent\nPBS_HOME={tmp_path}/home\n")
    (tmp_path / "state.json").write_text('{"hook": {}, "resource": {}}')
    (tmp_path / "qmgr.py").write_text(QMGR)
    for name, body in {
        "qmgr": f'exec /usr/bin/python3 -I "{tmp_path}/qmgr.py" "$@"',
        "pbsnodes": "echo 'n9   down'",
    }.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    return Server(tmp_path)


def test_a_first_time(server: Server) -> None:
    done = server.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "nodes that are down or offline get the hook when they are back: n9" in done.stdout
    hook, resource = server.state["hook"]["stager"], server.state["resource"]["pyenv"]
    assert resource == {"type": "string", "flag": "m"}
    assert hook["script"] == (REPO / "hooks/pbs/stager_hook.py").read_text()
    assert hook["config"] == '{"limit": 840}\n'
    assert (hook["enabled"], hook["fail_action"], hook["alarm"]) == ("true", "none", "900")
    events = set(hook["event"].split(","))
    assert not events & {"execjob_launch", "execjob_end"} and len(events) == 8
    # It is not in force while it is half of itself.
    said = server.said()
    imported = next(number for number, line in enumerate(said) if line.startswith("import"))
    assert "set hook stager enabled = false" in said[:imported]
    assert said[-2:] == ["set hook stager enabled = true", "list hook stager"]


def test_again_and_with_settings(server: Server) -> None:
    assert server.run().returncode == 0
    arguments = ("--alarm", "600", "--set", "stager=/opt/stager", "--set", "reruns=1")
    assert server.run(*arguments).returncode == 0
    assert server.said().count("create hook stager") == 1
    assert server.said().count("create resource pyenv type=string,flag=m") == 1
    expected = '{"limit": 540, "stager": "/opt/stager", "reruns": 1}\n'
    assert server.state["hook"]["stager"]["config"] == expected
    assert server.run("--check").returncode == 0


def test_a_mom_that_does_not_get_it(server: Server) -> None:
    server.change(stuck=True)
    done = server.run("--wait", "1")
    assert done.returncode == 1
    assert "no hook yet on: n1 n2" in done.stderr
    assert server.run("--check").returncode == 1
    server.change(stuck=False)
    assert server.run("--wait", "1").returncode == 0


def test_jobs_go_on_while_it_is_installed_again(server: Server) -> None:
    """A mom that is waiting in the hook gets the rest of it minutes after it was disabled."""
    assert server.run().returncode == 0
    before = len(server.said())
    assert server.run().returncode == 0
    assert "set hook stager enabled = false" not in server.said()[before:]
    assert server.state["hook"]["stager"]["enabled"] == "true"


def test_another_resource_of_that_name(server: Server) -> None:
    server.change(resource={"pyenv": {"type": "long", "flag": "h"}})
    done = server.run()
    assert done.returncode == 1
    assert "there is a resource pyenv already, of type long" in done.stderr
    assert server.state["hook"] == {}


def test_classic_scripts_that_stop_running(server: Server) -> None:
    (server.root / "home/mom_priv/prologue").write_text("#!/bin/sh\n")
    done = server.run()
    assert done.returncode == 0
    assert "mom_priv/prologue does not run any more" in done.stderr


def test_uninstall(server: Server) -> None:
    assert server.run().returncode == 0
    server.change(jobs=True)
    done = server.run("--uninstall")
    assert done.returncode == 0 and "kept the resource pyenv" in done.stdout
    assert server.state["hook"] == {}
    server.change(jobs=False)
    assert server.run("--uninstall").returncode == 0
    assert server.state["resource"] == {}
    assert server.run("--uninstall").returncode == 0  # nothing is left to do
    assert server.run("--check").returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--alarm", "soon"), ("--alarm",), ("--what",), ("--set", "x=1"), ("--set", 'stager=/a"b'),
        ("--wait", "-1"),
    ],
)  # fmt: skip
def test_wrong_arguments(server: Server, arguments: tuple[str, ...]) -> None:
    done = server.run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("stager: error: ")
    assert not (server.root / "log").exists()


def test_a_machine_that_is_no_server(server: Server) -> None:
    (server.root / "bin/qmgr").unlink()
    done = server.run()
    assert done.returncode == 1 and "there is no qmgr here" in done.stderr
    (server.root / "pbs.conf").unlink()
    assert "cannot be read" in server.run().stderr


def test_a_complaint_of_qmgr_is_told(server: Server) -> None:
    command = server.root / "bin/qmgr"
    command.write_text("#!/bin/sh\necho 'qmgr: cannot connect to server' >&2\nexit 1\n")
    done = server.run()
    assert done.returncode == 1
    assert "cannot connect to server" in done.stderr


def test_files_for_nodes(tmp_path: Path) -> None:
    """``deploy/install --pbs`` for a node image."""
    priv = tmp_path / "var/spool/pbs/mom_priv"
    priv.mkdir(parents=True)
    (priv / "epilogue").write_text("")
    conf = tmp_path / "conf"
    conf.write_text("PBS_HOME=/var/spool/pbs\n")

    def install(*more: str) -> str:
        done = subprocess.run(
            [str(REPO / "deploy/install"), "--pbs", "--unitdir", "", *more],
            env={**os.environ, "PBS_CONF_FILE": str(conf)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = install("--root", f"{tmp_path}/2", "--store", "/local/s", "--bindir", "/opt/bin")
    assert told.endswith("pbs/install --set stager=/opt/bin/stager --set stores=/local/s\n")
    told = install("--root", str(tmp_path))
    assert told.endswith("pbs/install\n")
    assert "mom_priv/epilogue will not run any more" in told
    assert "Prolog=" not in told
    for shell, suffix in ((["sh"], "sh"), (["csh", "-f"], "csh")):
        profile = tmp_path / "etc/profile.d" / f"zz-stager.{suffix}"
        script = tmp_path / f"script.{suffix}"
        read = "." if suffix == "sh" else "source"
        script.write_text(f"{read} {profile}\n{read} {profile}\necho $PATH\n")
        environ = {"PATH": "/usr/bin:/bin", "STAGER_PATH": "/j/env/bin", "PBS_JOBID": "7.head"}
        shown = subprocess.run([*shell, script], env=environ, stdout=subprocess.PIPE, check=True)
        assert shown.stdout == b"/j/env/bin:/usr/bin:/bin\n"  # once
    installed = tmp_path / "usr/libexec/stager/pbs"
    assert (installed / "stager_hook.py").is_file()
    assert stat.S_IMODE((installed / "install").stat().st_mode) == 0o755
