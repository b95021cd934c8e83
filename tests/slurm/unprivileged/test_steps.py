"""``stage-run`` in steps, batch scripts and shells of allocations, by a user without rights."""

from __future__ import annotations

import re

import pytest

from .login import (
    HOME,
    NODES,
    ORIGINAL,
    SHOW,
    STAGE_RUN,
    STAGER,
    STORE,
    Login,
    assert_staged,
    ranks,
    until,
)

RUN = f"{STAGE_RUN} --env science"
PREFIX = 'python -I -c "import sys; print(sys.prefix)"'


# -- steps


def test_every_rank_of_every_node_runs_from_the_store(cold: Login) -> None:
    output = cold.run(
        "srun", "-N4", "--ntasks-per-node=3", STAGE_RUN, "--env=science", "python", SHOW
    )
    assert_staged(output, 12)
    assert [cold.mounts(node) for node in NODES] == [1, 1, 1, 1]
    # The original is not there for a rank that would have used it.
    assert cold.status("srun", "-N1", f"{ORIGINAL}/bin/python", SHOW)[0] != 0


def test_64_tasks_start_one_python_make_one_copy_and_one_mount(cold: Login) -> None:
    job = ["srun", "-w", "n1", "-n", "64", "--overcommit"]
    trace = cold.trace("n1")
    try:
        first = cold.run(*job, "sh", "-c", f"{RUN} {PREFIX}")
    finally:
        calls = trace.end()
    assert len(first.splitlines()) == 64
    assert {line.rpartition("/")[0] for line in first.splitlines()} == {f"{STORE}/envs"}
    assert len([one for one in calls if re.search(r'execve\(".*", \[".*stage-run"', one)]) == 64
    pythons = [one for one in calls if f'execve("{HOME}/tools/bin/' in one and '"run"' in one]
    # The kernel is asked for the script first, and for its interpreter with the same call.
    assert len(pythons) == 1, pythons
    assert len([one for one in calls if re.match(r'execve\("/\S+/squashfuse', one)]) == 1
    assert len([one for one in calls if re.search(rf'^rename.*"{STORE}/images/', one)]) == 1
    assert cold.mounts("n1") == 1


def test_a_second_step_finds_the_image_there(cold: Login) -> None:
    output = cold.batch(
        f"""
        srun {RUN} python {SHOW}
        ls -i {STORE}/images
        srun {RUN} python {SHOW}
        ls -i {STORE}/images
        """,
        "-wn1",
        "-n4",
    )
    assert_staged(output, 8, ["n1"])
    before, after = re.findall(r"^(\d+ [0-9a-f]{16})$", output, re.MULTILINE)
    assert before == after


def test_the_end_of_a_step_kills_the_fuse_server_and_the_next_step_mounts_again(
    cold: Login,
) -> None:
    assert_staged(cold.run("srun", "-wn1", "-n2", *RUN.split(), "python", SHOW), 2, ["n1"])
    cold.kill_servers("n1")
    assert "not connected" in cold.sh("n1", f"ls {STORE}/envs/*/ 2>&1; true")
    assert_staged(cold.run("srun", "-wn1", "-n2", *RUN.split(), "python", SHOW), 2, ["n1"])
    assert cold.mounts("n1") == 1


def test_two_steps_at_once_do_not_depend_on_each_other(cold: Login) -> None:
    # The second step comes while the first uses its mount, which the first one's end takes away.
    output = cold.batch(
        f"""
        srun --exact -n1 {RUN} sh -c 'touch one; until [ -e two ]; do sleep 0.1; done
            python {SHOW}' &
        until [ -e one ]; do sleep 0.1; done
        srun --exact -n1 {RUN} sh -c 'python {SHOW}; touch two
            until [ -e three ]; do sleep 0.1; done; python {SHOW}' &
        wait %1
        pkill -KILL -u "$USER" squashfuse
        touch three
        wait
        rm one two three
        """,
        "-wn1",
        "-n2",
    )
    assert_staged(output, 3, ["n1"])
    assert cold.mounts("n1") == 0  # extracted in the place of the mount


def test_a_job_does_not_use_the_mount_of_another_job(cold: Login) -> None:
    first = cold.submit(f"{RUN} sh -c 'touch up; sleep 600'", "-wn1", "-n1")
    until("the first job", (cold.home / "up").exists)
    assert cold.mounts("n1") == 1
    assert_staged(cold.run("srun", "-wn1", *RUN.split(), "python", SHOW), 1, ["n1"])
    assert cold.mounts("n1") == 0
    cold.run("scancel", str(first))
    cold.cluster.wait(first)
    (cold.home / "up").unlink()
    assert_staged(cold.run("srun", "-wn1", *RUN.split(), "python", SHOW), 1, ["n1"])


def test_the_end_of_a_job_leaves_what_another_one_has_put_in_the_place_of_its_mount(
    cold: Login,
) -> None:
    keeping = cold.submit(f"{RUN} srun sh -c 'touch up; sleep 600'", "-N2", "-wn1,n2", "-n2")
    until("the first job", (cold.home / "up").exists)
    assert cold.mounts("n1") == 1
    using = cold.submit(f"srun {RUN} sh -c 'touch too; sleep 600'", "-wn1", "-n1")
    until("the second job", (cold.home / "too").exists)
    assert cold.mounts("n1") == 0
    stamps = cold.sh("n1", f"ls -i {STORE}/ready")
    assert stamps
    cold.run("scancel", str(keeping))
    cold.cluster.wait(keeping)
    until("the keepers", lambda: not cold.sh("n1", "pgrep -f '[ ]keep ' || true"))
    assert cold.sh("n1", f"ls -i {STORE}/ready") == stamps
    cold.run("scancel", str(using))
    cold.cluster.wait(using)
    for name in ("up", "too"):
        (cold.home / name).unlink()


@pytest.mark.parametrize(
    "script",
    [f"srun {RUN} --how extract true", f"{RUN} --how extract srun true"],
    ids=["step", "keeper"],
)
def test_cancelling_in_the_middle_leaves_nothing_that_is_taken_for_ready(
    cold: Login, script: str
) -> None:
    slow = cold.home / "slow"
    slow.mkdir(exist_ok=True)
    (slow / "unsquashfs").write_text('#!/bin/sh\n/usr/bin/unsquashfs "$@"\nexec sleep 300\n')
    (slow / "unsquashfs").chmod(0o755)
    job = cold.submit(f"PATH={HOME}/slow:$PATH {script}", "-N2", "-wn1,n2", "-n8")
    for node in ("n1", "n2"):
        staged = f"ls -d {STORE}/tmp/*/*/bin/python 2>/dev/null; true"
        until("staging", lambda node=node, ask=staged: cold.sh(node, ask) != "")
    cold.run("scancel", str(job))
    assert cold.cluster.wait(job) == "CANCELLED"
    assert [cold.sh(node, f"ls {STORE}/ready") for node in ("n1", "n2")] == ["", ""]
    output = cold.run("srun", "-wn1,n2", "-N2", "-n8", *RUN.split(), "python", SHOW)
    assert_staged(output, 8, ["n1", "n2"])


def test_fallback_for_all_ranks_with_one_message(cold: Login) -> None:
    cold.hide_original(hidden=False, nodes=["n1"])
    try:
        cold.sh("n1", "touch /mnt/local/store")  # a file where the store is to be
        output = cold.run(
            "srun", "-wn1", "-n4", *RUN.split(), "--store", "/mnt/local/store", "python", SHOW
        )
        assert [prefix for _, _, prefix in ranks(output)] == [ORIGINAL] * 4
        said = [line for line in output.splitlines() if "stage-run:" in line]
        assert len(said) == 1
        assert "running the original environment: the store /mnt/local/store" in said[0]
    finally:
        cold.hide_original(nodes=["n1"])


def test_strict_is_status_125_for_all_ranks_with_one_message(cold: Login) -> None:
    script = f"{RUN} --strict --store /proc/none python {SHOW}; echo status $?"
    output = cold.run("srun", "-wn1", "-n4", "sh", "-c", script)
    assert output.count("status 125") == 4
    assert ranks(output) == []
    assert output.count("stager: error:") == 1


def test_a_command_keeps_its_status_and_its_arguments(cold: Login) -> None:
    argv = ["sh", "-c", 'printf "<%s>" "$@"; exit 7', "name", "a b", "$(id)", "", "--env"]
    status, output = cold.status("srun", "-wn1", "-n2", *RUN.split(), *argv)
    assert status == 7
    assert output.count("<a b><$(id)><><--env>") == 2
    assert cold.status("srun", "-wn1", STAGE_RUN, "--env", "science", "nonsense")[0] == 127


def test_ranks_with_other_options_or_variables_are_on_their_own(cold: Login) -> None:
    # What one rank found out is no answer for another one that asked for something else.
    script = f"""
        if [ $SLURM_PROCID = 0 ]; then
            exec {RUN} sh -c 'echo zero $PATH'
        fi
        PATH=$PATH:/opt/other exec {STAGE_RUN} --env {ORIGINAL} sh -c 'echo one $PATH'
    """
    output = cold.run("srun", "-wn1", "-n2", "sh", "-c", script)
    zero, one = sorted(output.splitlines(), reverse=True)
    assert zero.startswith(f"zero {STORE}/envs/")
    assert not zero.endswith("/opt/other")
    assert one.startswith(f"one {STORE}/envs/")
    assert one.endswith(":/opt/other")


@pytest.mark.parametrize("plant", ["mkdir -m 0777 {}", "ln -s /home/bob {}", "touch {}"])
def test_somebody_elses_sessions_are_not_believed(cold: Login, plant: str) -> None:
    cold.cluster.exec("n1", "bob", ["sh", "-c", plant.format(STORE)])
    try:
        output = cold.run(
            "srun", "-wn1", "-n2", *RUN.split(), "--store=/mnt/local/alice", "python", SHOW
        )
        assert len(ranks(output)) == 2
        assert {prefix.rpartition("/")[0] for _, _, prefix in ranks(output)} == {
            "/mnt/local/alice/envs"
        }
    finally:
        cold.sh("n1", f"rm -rf {STORE}", root=True)


# -- batch scripts and shells: every node from one of them


def test_a_batch_script_stages_on_every_node_and_its_end_unmounts(cold: Login) -> None:
    output = cold.batch(
        f"""
        {RUN} srun python {SHOW}
        {RUN} srun -n2 -N2 sh -c 'grep -c {STORE}/envs /proc/mounts'
        pgrep -fc 'srun.*stager keep'
        """,
        "-N4",
        "-n8",
    )
    assert_staged(output, 8)
    # srun is two processes; a second stage-run in the job has started no second keeper.
    assert output.splitlines()[-3:] == ["1", "1", "2"]
    assert [cold.mounts(node) for node in NODES] == [0, 0, 0, 0]
    assert [cold.count("squashfuse", node) for node in NODES] == [0, 0, 0, 0]
    claims = [cold.sh(node, f"ls {STORE}/leases/*/* 2>/dev/null; true") for node in NODES]
    assert claims == ["", "", "", ""]


def test_activate_in_a_batch_script_is_for_all_nodes(cold: Login) -> None:
    output = cold.batch(
        f"""
        eval "$({STAGER} activate science)" || exit 1
        python {SHOW}
        srun -n4 -N4 python {SHOW}
        """,
        "-N4",
    )
    assert_staged(output, 5)


def test_a_batch_script_of_one_node_needs_no_keeper(cold: Login) -> None:
    output = cold.batch(f"{RUN} sh -c 'python {SHOW}; pgrep -fc [s]tager.keep; true'", "-wn2")
    assert_staged(output, 1, ["n2"])
    assert output.splitlines()[-1] == "0"


def test_the_shell_of_salloc_runs_outside_of_the_allocation(cold: Login) -> None:
    script = f"{RUN} srun python {SHOW}; {RUN} python {SHOW}"
    output = cold.run("salloc", "-N2", "-wn3,n4", "sh", "-c", script)
    assert [node for node, _, _ in ranks(output)] == ["-", "n3", "n4"]
    inside = [prefix for node, _, prefix in ranks(output) if node != "-"]
    assert all(prefix.startswith(STORE) for prefix in inside)
    # On the login node nothing is staged: there it is the original.
    assert ranks(output)[0][2] == ORIGINAL


def test_a_shell_that_srun_gave_can_start_steps(cold: Login) -> None:
    script = f"{RUN} srun --overlap -N2 -n2 python {SHOW}"
    output = cold.run(
        "srun", "-N2", "-wn1,n2", "-n2", "sh", "-c", f"[ $SLURM_PROCID = 1 ] || {script}"
    )
    assert_staged(output, 2, ["n1", "n2"])


def test_a_batch_script_submitted_from_a_step_is_no_step(cold: Login) -> None:
    # sbatch hands SLURM_STEP_ID of the submitting step on.
    (cold.home / "leak.sh").write_text(
        f"#!/bin/sh\necho step $SLURM_STEP_ID\n{RUN} sh -c 'srun -N4 -n4 python {SHOW}'\n"
    )
    cold.run("srun", "-wn1", "sbatch", "--wait", "-N4", "--output=leak.out", "leak.sh")
    output = (cold.home / "leak.out").read_text()
    assert "step 0" in output
    assert_staged(output, 4)


def test_a_node_that_cannot_stage_makes_all_fall_back_with_one_line(cold: Login) -> None:
    cold.hide_original(hidden=False)
    try:
        cold.cluster.exec("n3", "bob", ["mkdir", STORE])
        output = cold.batch(f"{RUN} srun python {SHOW}", "-N4", "-n4")
        assert [prefix for _, _, prefix in ranks(output)] == [ORIGINAL] * 4
        said = [line for line in output.splitlines() if not line.startswith("rank")]
        assert len(said) == 1
        assert "1 of 4 nodes cannot stage: n3: the store" in said[0]
        output = cold.batch(f"{RUN} --strict srun python {SHOW}; echo $?", "-N4", "-n4")
        assert ranks(output) == []
        assert output.splitlines()[-1] == "125"
    finally:
        cold.sh("n3", f"rm -rf {STORE}", root=True)
        cold.hide_original()


def test_a_node_whose_python_does_not_start_is_not_waited_for(cold: Login) -> None:
    # The limit is ten minutes, a test's two.
    python = cold.sh("n2", "realpath /usr/bin/python3").strip()
    cold.hide_original(hidden=False)
    cold.sh("n2", f"mount --bind /dev/null {python}", root=True)
    try:
        output = cold.batch(f"{RUN} sh -c '{PREFIX}; echo $?'", "-N2", "-wn1,n2")
    finally:
        cold.sh("n2", f"umount {python}", root=True)
        cold.hide_original()
    assert "running the original environment: stager failed on n2 (Exit" in output
    assert f"execve(): {HOME}/tools/bin/python" in output
    assert output.splitlines()[-2:] == [ORIGINAL, "0"]


def test_what_a_step_that_failed_has_mounted_stays_until_the_job_ends(cold: Login) -> None:
    # Another environment of the job, over the same base, may be using it.
    try:
        cold.cluster.exec("n2", "bob", ["mkdir", STORE])
        output = cold.batch(
            f"""
            for turn in one two; do
                {RUN} --strict srun true
                pgrep -fc 'srun.*stager keep'
                grep -c ' {STORE}/envs/' /proc/mounts
            done
            ls {STORE}/envs/*/bin/python
            """,
            "-N2",
            "-wn1,n2",
        )
    finally:
        cold.sh("n2", f"rm -rf {STORE}", root=True)
    assert output.count("1 of 2 nodes cannot stage: n2: the store") == 2
    # srun is two processes; the second one mounted nothing, and was ended.
    numbers = [line for line in output.splitlines() if line.isdigit()]
    assert numbers == ["2", "1", "2", "1"], output
    assert output.splitlines()[-1].startswith(f"{STORE}/envs/"), output
    until("the keepers", lambda: not cold.sh("n1", "pgrep -f '[ ]keep ' || true"))
    assert (cold.mounts("n1"), cold.count("squashfuse", "n1")) == (0, 0)
    assert cold.sh("n1", f"ls {STORE}/leases/*/* 2>/dev/null; true") == ""


def test_an_image_sent_with_sbcast(cold: Login) -> None:
    # The nodes cannot read the images, so they can have them only from sbcast.
    images = f"{HOME}/.local/share/stager/images"
    for node in NODES[1:]:
        cold.sh(node, f"mount -t tmpfs -o ro,size=4k hidden {images}", root=True)
    try:
        output = cold.batch(f"{RUN} --strict --via sbcast srun python {SHOW}", "-N4", "-n4")
    finally:
        for node in NODES[1:]:
            cold.sh(node, f"umount {images}", root=True)
    assert_staged(output, 4)
    left = [cold.sh(node, "ls -d /tmp/.stager-* 2>/dev/null; true") for node in NODES]
    assert left == ["", "", "", ""]


def test_mounts_stay_while_the_job_uses_its_grace_time(cold: Login) -> None:
    (cold.home / "checkpoint.sh").write_text(
        f"trap 'sleep 1; {PREFIX}; exit 0' TERM\ntouch up\nwhile :; do sleep 0.1; done\n"
    )
    job = cold.submit(f"{RUN} srun sh checkpoint.sh", "-N2", "-n2", "-wn1,n2")
    until("the job", (cold.home / "up").exists)
    # Where a cgroup tracks processes, the servers get the signal too.
    for node in ("n1", "n2"):
        cold.sh(node, "pkill -TERM squashfuse")
    cold.run("scancel", str(job))
    cold.cluster.wait(job)
    (cold.home / "up").unlink()
    lines = cold.output(job).splitlines()
    assert len([one for one in lines if one.startswith(f"{STORE}/envs/")]) == 2, lines


# -- which environment


def test_the_environment_comes_from_the_directive(cold: Login) -> None:
    output = cold.batch(
        f"srun {STAGE_RUN} python {SHOW}",
        "-N2",
        "-wn1,n2",
        "--comment=other=1 pyenv:science?strict",
    )
    assert_staged(output, 2, ["n1", "n2"])
    output = cold.batch(
        f"srun {STAGE_RUN} python {SHOW}; echo $?", "-N1", "--comment=pyenv:unheard?strict"
    )
    assert "`unheard` is not published" in output
    assert output.splitlines()[-1] == "125"


def test_the_directive_is_asked_for_once_on_a_node(cold: Login) -> None:
    trace = cold.trace("n1")
    try:
        job = ["srun", "-wn1", "-n16", "--comment=pyenv:science"]
        output = cold.run(*job, STAGE_RUN, "sh", "-c", PREFIX)
    finally:
        calls = trace.end()
    assert len(output.splitlines()) == 16
    assert {line.rpartition("/")[0] for line in output.splitlines()} == {f"{STORE}/envs"}
    assert len([one for one in calls if 'execve("/usr/bin/squeue"' in one]) == 1


def test_the_variable_is_stronger_than_the_directive(cold: Login) -> None:
    output = cold.run(
        "env", "STAGER_ENV=science", "srun", "-wn1", "--comment=pyenv:unheard",
        STAGE_RUN, "python", SHOW,
    )  # fmt: skip
    assert_staged(output, 1, ["n1"])
