"""The PBS hook of stager: stages the environment that a job asks for by ``-l pyenv=REF``.

One file that the server hands to every pbs_mom, for the Python inside of PBS (3.6 and newer) and
nothing but its standard library. It decides nothing about environments: it has the ``stager`` that
is installed on each node do that, and reads what that leaves below /run/stager/jobs.

    queuejob, modifyjob         the server: -v PYENV=REF becomes -l pyenv=REF; its form is checked
    execjob_begin               first node: starts staging, sets the job's variables, returns
                                other nodes: the same, and waits, for this is what PBS waits for
    execjob_prologue            first node: waits, which does not hold up pbs_mom there, and is
                                where the user can be told something
    execjob_preterm             ends staging when the job is deleted meanwhile
    execjob_epilogue, _abort    gives back what the job holds
    exechost_periodic           the same for jobs whose end nobody told

Neither execjob_launch, where an exception deletes the job and which runs for every task, nor
execjob_end, with which pbs_mom may keep jobs of several nodes for ever. No exception leaves this
file; the only jobs that do not run are those that ask for ``?strict`` and cannot have it.
"""

import contextlib
import os
import re
import time

import pbs

SETTINGS = {
    "stager": "/usr/bin/stager",  # the command on every node
    "state": "/run/stager",  # where it keeps the states of jobs
    "stores": "/var/lib/stager",  # parent of the users' stores, where only root can make one
    "find": 2.0,  # seconds to look for what is published, before the job's variables are set
    "limit": 840.0,  # seconds to wait for staging; less than the hook's alarm
    "reruns": 2,  # how often a job may leave a node whose disk is broken
}
RESOURCE, ALIAS = "pyenv", "PYENV"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@sha256:[0-9a-f]{12,64})?\Z")
_OPTIONS = {
    "strict": re.compile(r"\Z"),
    "verbose": re.compile(r"\Z"),
    "format": re.compile(r"(squashfs|tar\.zst)\Z"),
    "on_stale": re.compile(r"(repack|warn|fallback|ignore)\Z"),
    "timeout": re.compile(r"\d+(\.\d+)?\s*(ms|s|m|h|d|)\Z"),
}
_LONGEST = 1024
_STARTING = 60.0  # seconds; measured: 0.2
_DEAD = 15.0  # seconds for which a living worker does not leave its status alone
_READ_ONLY = re.compile(r"PBS_|TMPDIR\Z")  # PBS lets no hook change these (pbs/v1/_base_types.py)

MESSAGES = {
    "": "stager could not be started on this node; tell your administrator",
    "pending": "staging has not finished; tell your administrator",
    "dead": "the staging worker was killed; tell your administrator",
}
PARTLY = (
    "only PATH is set for the environment; its other variables could not be determined"
    " within {:g} s; pack it before you submit"
)

# -- on the server -----------------------------------------------------------------------------


def queued(event):
    """Take the alias, and refuse what nothing could be staged by."""
    wish = wanted(event.job)
    if not wish:
        wish = unescaped(str(event.job.Variable_List.get(ALIAS) or ""))
        if not wish:
            return
        event.job.Resource_List[RESOURCE] = wish
    refuse_malformed(event, wish)


def modified(event):
    wish = wanted(event.job)
    if wish:
        refuse_malformed(event, wish)


def refuse_malformed(event, wish):
    wrong = malformed(wish)
    if wrong:
        event.reject(f"stager: {wrong}")


def options(wish):
    """The options of a directive; qsub lets no ampersand pass, so they may be parted by ``?``."""
    return re.split("[&?]", wish.partition("?")[2])


def is_strict(wish):
    return any(item.partition("=")[0] == "strict" for item in options(wish))


def malformed(wish):
    """What is wrong with the form of REF[+REF...][?option&option=value]; empty where nothing is."""
    if len(wish.encode("utf-8", "surrogateescape")) > _LONGEST:
        return f"pyenv is longer than {_LONGEST} bytes"
    if any(ord(char) < 32 or ord(char) == 127 for char in wish):
        return "pyenv has control characters"
    for name in wish.partition("?")[0].split("+"):
        if name.startswith(("/", "./", "../", "~")) or name in (".", ".."):
            continue
        if not name:
            return "pyenv names no environment: write pyenv=NAME or pyenv=/path"
        if not _NAME.match(name):
            return f"pyenv={name} is neither an environment's name nor a path beginning with /"
    for item in options(wish):
        key, _, value = item.partition("=")
        if item and key not in _OPTIONS:
            known = ", ".join(sorted(_OPTIONS))
            return f"?{item} is no option of pyenv; options are {known}"
        if item and not _OPTIONS[key].match(value):
            return f"?{item} has no value that {key} may have"
    return ""


# -- on the nodes ------------------------------------------------------------------------------


def begin(event):
    """Start staging. The first node must not wait here: it would hold up every other job."""
    job = event.job
    wish = wanted(job)
    first = job.in_ms_mom()
    if first or not wish:  # to the others comes what the first node has set by then
        forget(job)
    if not wish:
        make_store(job)
        return
    told = about(job)
    told.update(pyenv=wish, first=bool(first), find=SETTINGS["find"])
    if first:
        told["variables"] = variables = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        for name in list(job.Variable_List.keys()):
            variables[name] = unescaped(str(job.Variable_List[name]))
    answer = call("pbs-begin", told)
    if first and "error" in answer and status_of(job)[0] in ("pending", "ready"):
        call("pbs-end", about(job))  # the job will not know where it is: it is not staged
    try:
        activate(job, answer)
    except Exception as error:  # a value that PBS does not take: not by half, then
        log(f"the job's variables cannot be set: {type(error).__name__}: {error}")
        call("pbs-end", about(job))
        forget(job)
    if not first:
        status, _ = await_worker(job)
        if "error" in answer or status not in ("ready", "failed"):  # nobody told the first node
            reason = "the staging worker was killed or never began; tell your administrator"
            reason = answer.get("error") or reason
            call("pbs-note", dict(about(job), pyenv=wish, reason=reason))
    elif ALIAS in list(job.Variable_List.keys()):
        job.Variable_List[ALIAS] = escaped(wish)  # what stage-run in the job goes by
    leave_broken_node(event)


def activate(job, answer):
    """Set the job's variables, but those that are for PBS alone to set."""
    for name in answer.get("unset", ()):
        if name in list(job.Variable_List.keys()):
            del job.Variable_List[name]
    for name, value in answer.get("set", {}).items():
        if not _READ_ONLY.match(name):
            job.Variable_List[name] = escaped(value)


def forget(job):
    """Take back what was set for an earlier run of the job, or for the job that submitted it."""
    jobs = os.path.join(SETTINGS["state"], "jobs") + "/"
    for name in list(job.Variable_List.keys()):
        value = unescaped(str(job.Variable_List[name]))
        if jobs not in value or _READ_ONLY.match(name):
            continue
        separator = "," if name.endswith("_BIND") else ":"
        rest = separator.join(item for item in value.split(separator) if jobs not in item)
        if rest:
            job.Variable_List[name] = escaped(rest)
        else:
            del job.Variable_List[name]


def make_store(job):
    """For stage-run in a job without the directive: one look where the user has a store."""
    import pwd

    user = pwd.getpwnam(str(job.euser))
    name = str(user.pw_uid)
    try:
        parent = os.open(SETTINGS["stores"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # this site has none
    try:
        info = os.fstat(parent)
        if user.pw_uid == 0 or info.st_uid != 0 or info.st_mode & 0o022:
            return  # elsewhere users make their own
        # Only its name is looked at: whatever its user has mounted there might never answer.
        if name in os.listdir(parent):
            return
        new = name + ".new"
        with contextlib.suppress(FileExistsError):
            os.mkdir(new, 0o700, dir_fd=parent)
        os.chown(new, user.pw_uid, user.pw_gid, dir_fd=parent, follow_symlinks=False)
        os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(parent)


def prologue(event):
    """See that the first node is staged, and tell the user what went wrong."""
    job = event.job
    if not wanted(job) or not job.in_ms_mom():
        return
    try:
        see_to(event)
    except Exception as error:  # reject() raises SystemExit
        log(f"{type(error).__name__}: {error}")
        if strict(job):
            end_strict(event, "nobody knows whether it is staged; tell your administrator")


def see_to(event):
    job = event.job
    status, message = await_worker(job)
    if status == "cancelled":
        job.delete()
        event.reject("stager: the job was deleted while it was staged")
    leave_broken_node(event)
    message = MESSAGES.get(status, message)
    if status in ("dead", "pending"):
        # Nothing of ours is to change while the job runs.
        call("pbs-cancel", dict(about(job), reason=message))
    partly = status == "ready" and os.path.exists(in_state(job, "partly"))
    if partly:
        message = "; ".join(filter(None, (PARTLY.format(SETTINGS["find"]), message)))
    failed = tell_of_others(job, strict(job) and status == "ready")
    if strict(job) and (status != "ready" or partly):
        end_strict(event, message)
    if strict(job) and failed:
        end_strict(event)
    if status == "ready":
        if message:
            say(message)
        return
    try:
        original = os.readlink(in_state(job, "env"))
        say(f"not staged, running the original {original}: {message}")
    except OSError:
        say("not staged, running without: " + message)


def strict(job):
    # Where stager itself is gone, only what the job asked for is known.
    return is_strict(wanted(job)) or os.path.exists(in_state(job, "strict"))


def end_strict(event, reason=""):
    if reason:
        say("not staged, and this job is strict: " + reason)
    event.job.delete()
    event.reject("stager: not staged, and this job is strict")


def tell_of_others(job, all_tell):
    """Say which other nodes are not staged; returns whether any is not, as far as is known.

    All nodes of a strict job tell how it went; those of others, where it went wrong.
    """
    others, told, failed = len(hosts(job)) - 1, set(), False
    for note in call("pbs-notes", about(job)).get("notes", []) if others > 0 else []:
        node, _, reason = note.partition(": ")
        told.add(node)
        if reason:
            failed = True
            say("not staged there: " + reason, node)
    # They are counted: a mom may call its node otherwise than the server calls the node's host.
    if all_tell and (len(told) < others or others < 0):
        failed = True
        known = {node.partition(".")[0] for node in told | {pbs.get_local_nodename()}}
        names = {host.partition(":")[0] for host in hosts(job)}
        silent = sorted(host for host in names if host.partition(".")[0] not in known)
        say(
            "did not confirm that it is staged, and this job is strict",
            ",".join(silent) or "a node",
        )
    return failed


def preterm(event):
    """The end of a job; of interest where it is staged still."""
    if wanted(event.job) and status_of(event.job)[0] == "pending":
        call("pbs-cancel", dict(about(event.job), reason="the job was deleted"))


def ended(event):
    """Epilogue or abort; may come twice, and for jobs that were never staged here."""
    if os.path.isdir(in_state(event.job)):
        call("pbs-end", about(event.job))


def periodic(event):
    """Look for states of jobs that this node does not have any more."""
    try:
        states = set(os.listdir(os.path.join(SETTINGS["state"], "jobs")))
    except OSError:
        return
    known = list(event.job_list.keys()) if event.job_list else []
    if states - {file_name(job) for job in known}:
        call("pbs-sweep", {"jobs": known, "node": pbs.get_local_nodename()})


def leave_broken_node(event):
    """Where the site wants it: take a node offline whose disk is broken, and run elsewhere."""
    job = event.job
    reason = read(in_state(job, "fault"))
    if not reason or int(job.run_count or 0) > SETTINGS["reruns"]:
        return
    node = pbs.get_local_nodename()
    vnodes = own_vnodes(event)
    if not vnodes:
        log(f"{node} is not taken offline: none of the job's vnodes has its name; {reason}")
        return
    for vnode in vnodes:
        event.vnode_list[vnode].state = pbs.ND_OFFLINE
        event.vnode_list[vnode].comment = "stager: " + reason
    job.rerun()
    call("pbs-end", about(job))  # no other event of this run comes to a node that rejects
    event.reject(f"stager: {node}: {reason}")


def own_vnodes(event):
    """The names of this node's vnodes among the job's: ``n1``, ``n1[0]``, ``n1.site``."""
    node = pbs.get_local_nodename().lower()
    found = []
    for vnode in list(event.vnode_list.keys()):
        host = vnode.partition("[")[0].lower()
        if node in (host, host.partition(".")[0]):
            found.append(vnode)
    return found


# -- the job, and what is known of it ----------------------------------------------------------


def wanted(job):
    """The value of the resource, or nothing."""
    return str(job.Resource_List[RESOURCE] or "")


def about(job):
    return {
        "id": str(job.id),
        "user": str(job.euser or ""),
        "work_dir": unescaped(str(job.Variable_List.get("PBS_O_WORKDIR") or "")),
        "run_count": int(job.run_count or 0),
        "node": pbs.get_local_nodename(),
    }


def hosts(job):
    """The nodes, with their ports: ``exec_host2`` is ``n1.site:15002/0*2+n2.site:15002/0``."""
    return {part.partition("/")[0] for part in str(job.exec_host2 or "").split("+")} - {""}


def escaped(value):
    """PBS ends a variable's value at a comma."""
    return value.replace(",", "\\,")


def unescaped(value):
    return value.replace("\\,", ",")


def file_name(job):
    """As stager.schedulers.file_name: parts of arrays have brackets."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", str(job))[:100]


def in_state(job, *names):
    return os.path.join(SETTINGS["state"], "jobs", file_name(job.id), *names)


def read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def status_of(job):
    """One word, and how often the worker has said so."""
    words = read(in_state(job, "status")).split()
    return (words + ["", ""])[:2]


def await_worker(job):
    """Wait for the end of staging; returns the status and its message."""
    until = time.monotonic() + float(SETTINGS["limit"])
    last, since = None, time.monotonic()
    while True:
        status, beat = status_of(job)
        now = time.monotonic()
        if status != "pending" or now > until:
            return status, read(in_state(job, "message"))
        if beat != last:
            last, since = beat, now
        elif now - since > _DEAD:
            return "dead", ""
        time.sleep(0.1)


def call(verb, told):
    """Have stager do something; returns its answer, which is nothing where it could not be had."""
    try:
        answer = ask(verb, told)
    except Exception as error:  # it is not installed here, was killed, says something else
        answer = {"error": f"{type(error).__name__}: {error}"}
    if "error" in answer:
        log(verb + ": " + answer["error"])
    return answer


def ask(verb, told):
    import json
    import subprocess
    import threading

    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            [SETTINGS["stager"], "hook", verb, SETTINGS["state"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=nowhere,
            close_fds=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        killer = threading.Timer(_STARTING, process.kill)
        killer.start()
        try:
            said = process.communicate(json.dumps(told).encode())[0]
        finally:
            killer.cancel()
    return json.loads(said.decode())


def say(text, node=None):
    """To the job's own error output, or the user's terminal: a prologue has them."""
    text = f"{node or pbs.get_local_nodename()}: {text}"
    try:  # no buffer, which Python would try to write again at its end
        os.write(2, f"stager: {text}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:  # a full disk, a terminal that is gone
        log(f"cannot tell the user ({error.strerror}): {text}")


def log(text):
    pbs.logmsg(pbs.LOG_WARNING, "stager: " + text)


def load_settings():
    """What the site has set with ``qmgr -c 'import hook stager application/x-config'``."""
    import json

    path = getattr(pbs, "hook_config_filename", None)
    if path:
        with open(path) as file:
            for name, value in json.load(file).items():
                if name in SETTINGS:
                    SETTINGS[name] = type(SETTINGS[name])(value)


EVENTS = {
    "QUEUEJOB": queued,
    "MODIFYJOB": modified,
    "EXECJOB_BEGIN": begin,
    "EXECJOB_PROLOGUE": prologue,
    "EXECJOB_PRETERM": preterm,
    "EXECJOB_EPILOGUE": ended,
    "EXECJOB_ABORT": ended,
    "EXECHOST_PERIODIC": periodic,
}


def main():
    event = pbs.event()
    for name, handler in EVENTS.items():
        if event.type == getattr(pbs, name, None):
            if not concerned(name, event):
                return
            try:
                load_settings()
            except Exception as error:
                log(f"its configuration is not used: {error}")
            handler(event)


def concerned(name, event):
    """Whether an event has to do with us at all; most have not."""
    if name in ("EXECHOST_PERIODIC", "EXECJOB_BEGIN") or wanted(event.job):
        return True
    return name == "QUEUEJOB" and event.job.Variable_List.get(ALIAS)


try:
    main()
except Exception as error:  # accept() and reject() raise SystemExit
    with contextlib.suppress(Exception):
        log(f"{type(error).__name__}: {error}")
