"""Each configuration of the test Slurm refuses and allows what its file says; plain Slurm commands as its unprivileged user.

The tests of one configuration stand together, because switching takes seconds. ftlaunch has no part in this.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import UP, Configuration

pytestmark = pytest.mark.slurm

strict, tacc, norequeue, bare, untyped, default = (
    pytest.mark.parametrize("configuration", [name], indirect=True)
    for name in ("strict", "tacc", "norequeue", "bare", "untyped", "default")
)

LIMIT = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
ACCOUNT = "Invalid account or account/partition combination specified"
NOT_AVAILABLE = "Requested node configuration is not available"
TIME = "Requested time limit is invalid (missing or exceeds some limit)"
NODES = "Node count specification invalid"
NO_GRES = "Invalid generic resource (gres) specification"


IDLE = "while :; do sleep 0.2 & wait; done"
"""Goes on also where the sleep is ended before the shell is."""


@pytest.fixture
def sbatch(configuration: Configuration) -> Iterator[Callable[..., str]]:
    """Submits a job with what the configuration accepts and more, as its user; it is gone at the end. Gives the job id."""
    jobs: list[str] = []

    def submit(*options: str, job: str = "sleep 300", without: tuple[str, ...] = (), output: Path | str = "/dev/null") -> str:
        accepted = [option for option in configuration.accepts if option[2:].split("=")[0] not in without]
        done = configuration.stack.run("sbatch", "--parsable", *accepted, "--output", output, *options, "--wrap", job)
        jobs.append(done.stdout.splitlines()[-1])
        return jobs[-1]

    yield submit
    configuration.stack.run("scancel", *jobs)
    wait_until(lambda: not configuration.stack.run("squeue", "-h", "-o", "%i %T").stdout)


def wait_until(what: Callable[[], object], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, what
        time.sleep(0.3)


def shown(configuration: Configuration, kind: str, name: str) -> dict[str, str]:
    """The fields of ``scontrol show``."""
    line = configuration.stack.run("scontrol", "-o", "show", kind, name).stdout
    return dict(re.findall(r"(\S+?)=(.*?)(?= [A-Za-z/:]+=|$)", line.strip()))


def pending_reason(configuration: Configuration, job: str) -> str:
    """Why it waits, once Slurm knows; empty before."""
    fields = shown(configuration, "job", job)
    assert fields["JobState"] == "PENDING", fields
    return "" if fields["Reason"] in ("None", "Priority") else fields["Reason"]


def running(configuration: Configuration, job: str) -> bool:
    return shown(configuration, "job", job)["JobState"] == "RUNNING"


@pytest.fixture
def log(configuration: Configuration) -> Iterator[Path]:
    """A file that jobs can write."""
    file = configuration.stack.home / f"{configuration.name}.log"
    file.unlink(missing_ok=True)  # a job of an earlier test may have written once more when it was cancelled
    configuration.stack.run("touch", file)
    yield file
    file.unlink()


def assert_refused(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    accepted = [option for option in configuration.accepts if option[2:].split("=")[0] not in without]
    done = configuration.stack.run("sbatch", *accepted, *options, "--wrap", "true", check=False)
    assert done.returncode == 1 and f"sbatch: error: {words}" in done.stderr.replace("Batch job submission failed: ", ""), done.stderr


def assert_takes_and_runs(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    job = sbatch(job="true")
    wait_until(lambda: shown(configuration, "job", job)["JobState"] == "COMPLETED")


def refusals(**cases: tuple[list[str], list[str], str]) -> pytest.MarkDecorator:
    """What is left out of the options that the configuration accepts, what is put after them, Slurm's words."""
    return pytest.mark.parametrize(("without", "options", "words"), list(cases.values()), ids=list(cases))


@strict
def test_strict_runs_what_it_accepts(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    assert_takes_and_runs(configuration, sbatch)


@strict
@refusals(
    no_account=(["account"], [], ACCOUNT),
    default_account=([], ["--account=home"], ACCOUNT),
    no_qos=(["qos"], [], "Invalid qos specification"),
    unknown_qos=([], ["--qos=normal"], "Invalid qos specification"),
    qos_of_another_partition=([], ["--qos=debug"], "Invalid qos specification"),
    gpu_on_the_default_partition=(["partition", "constraint"], [], NOT_AVAILABLE),
    another_type_of_gpu=([], ["--gres=gpu:a100:1"], NOT_AVAILABLE),
    unknown_feature=([], ["--constraint=volta80"], "Invalid feature specification"),
    three_nodes_with_volta32=([], ["--nodes=3"], NOT_AVAILABLE),
    too_long=([], ["--time=2-00:00:01"], TIME),
    too_long_for_the_qos=(["gres", "constraint"], ["--partition=interactive", "--qos=debug", "--time=31"], LIMIT),
    too_many_nodes=([], ["--nodes=5"], NODES),
    too_many_gpus_for_the_qos=(["constraint"], ["--nodes=3", "--gres=gpu:volta:4"], "QOSGrpGRES"),
)
def test_strict_refuses(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    assert_refused(configuration, without, options, words)


@strict
def test_strict_limits_of_jobs(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    jobs = [sbatch("--time=5") for _ in range(4)]
    wait_until(lambda: running(configuration, jobs[1]))
    wait_until(lambda: pending_reason(configuration, jobs[2]) == "QOSMaxJobsPerUserLimit")
    refused = configuration.stack.run("sbatch", *configuration.accepts, "--wrap", "true", check=False)
    assert refused.returncode == 1 and "QOSMaxSubmitJobPerUserLimit" in refused.stderr and LIMIT in refused.stderr
    too_large = sbatch("--qos=besteffort", "--nodes=3", "--gres=gpu:volta:4", without=("constraint",))
    wait_until(lambda: pending_reason(configuration, too_large) == "QOSGrpGRES")


@strict
def test_strict_gpu_memory_needs_the_feature(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    without, with_feature = sbatch(without=("constraint", "time")), sbatch()
    wait_until(lambda: running(configuration, without) and running(configuration, with_feature))
    nodes = [shown(configuration, "node", shown(configuration, "job", job)["NodeList"]) for job in (without, with_feature)]
    assert [node["ActiveFeatures"] for node in nodes] == ["volta,volta16", "volta,volta32"]
    assert shown(configuration, "job", without)["TimeLimit"] == "00:02:00"


@strict
def test_strict_besteffort_is_requeued_without_notice(configuration: Configuration, sbatch: Callable[..., str], log: Path) -> None:
    """No signal of the user's, and no time: the end of the job is asked for at once."""
    heard = f"trap 'echo USR2 >>{log}' USR2; trap 'echo TERM >>{log}; exit' TERM; echo began >>{log}; {IDLE}"
    whole = ["--nodes=2", "--gres=gpu:volta:4"]
    job = sbatch("--qos=besteffort", *whole, "--time=10", "--signal=B:USR2@60", job=heard)
    wait_until(lambda: log.read_text() == "began\n")
    sbatch(*whole, job="true")
    wait_until(lambda: shown(configuration, "job", job)["Restarts"] == "1")
    wait_until(lambda: log.read_text().startswith("began\nTERM\n"))
    qos = configuration.stack.run("sacctmgr", "-nP", "show", "qos", "besteffort", "format=GraceTime,PreemptMode").stdout
    assert qos == "00:00:00|requeue\n"


@tacc
def test_tacc_runs_what_it_accepts(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    assert_takes_and_runs(configuration, sbatch)


@tacc
@refusals(
    gres=([], ["--gres=gpu:1"], NO_GRES),
    gpus=([], ["--gpus=1"], NO_GRES),
    gpus_per_node=([], ["--gpus-per-node=1"], NO_GRES),
    gpus_per_task=([], ["--gpus-per-task=1"], NO_GRES),
    mem=([], ["--mem=1G"], "FAILED: --mem options are not supported"),
    mem_0=([], ["--mem=0"], "FAILED: --mem options are not supported"),
    mem_per_cpu=([], ["--mem-per-cpu=1G"], "FAILED: --mem options are not supported"),
    no_partition=(["partition"], [], "FAILED: a queue is required (-p)"),
    no_time=(["time"], [], "FAILED: a time limit is required (-t)"),
    no_nodes=(["nodes"], [], "FAILED: the number of nodes is required (-N)"),
    no_tasks=(["ntasks"], [], "FAILED: the number of tasks is required (-n or --ntasks-per-node)"),
    node_by_name=([], ["--nodelist=node1"], "FAILED: specific nodes cannot be asked for (-w)"),
    too_long=([], ["--time=121"], TIME),
    too_many_nodes=([], ["--nodes=3", "--ntasks=3"], NODES),
)
def test_tacc_refuses(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    assert_refused(configuration, without, options, words)


@tacc
def test_tacc_banner_is_on_stdout(configuration: Configuration) -> None:
    done = configuration.stack.run("sbatch", "--parsable", *configuration.accepts, "--output", "/dev/null", "--wrap", "true")
    assert "Welcome to the Lonestar6 Supercomputer" in done.stdout and done.stdout.splitlines()[-1].isdigit() and not done.stderr


@tacc
def test_tacc_job_cannot_go_on_by_itself(configuration: Configuration, sbatch: Callable[..., str], log: Path) -> None:
    again = f"sbatch {' '.join(configuration.accepts)} --wrap true"
    scrubbed = f"env -i PATH=$PATH SLURM_CONF=$SLURM_CONF {again}"
    sbatch(job=f"{again}; {scrubbed}; srun -n 1 {again}; scontrol requeue $SLURM_JOB_ID; echo ended", output=log)
    wait_until(lambda: log.read_text().endswith("ended\n"))
    assert log.read_text().count("NOTIFICATION: sbatch not available on compute nodes. Use a login node.") == 3
    assert "Requested operation is presently disabled" in log.read_text() and "Submitted" not in log.read_text()


@tacc
def test_tacc_whole_nodes_without_gpus(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    jobs = [sbatch() for _ in range(3)]
    wait_until(lambda: pending_reason(configuration, jobs[1]) == "QOSMaxJobsPerUserLimit")
    wait_until(lambda: running(configuration, jobs[0]))
    assert "cpu=128," in shown(configuration, "job", jobs[0])["TRES"]
    refused = configuration.stack.run("sbatch", *configuration.accepts, "--wrap", "true", check=False)
    assert refused.returncode == 1 and "QOSMaxSubmitJobPerUserLimit" in refused.stderr
    assert set(configuration.stack.run("sinfo", "-h", "-o", "%G").stdout.split()) == {"(null)"}


@norequeue
def test_norequeue_runs_what_it_accepts(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    assert_takes_and_runs(configuration, sbatch)


@norequeue
@refusals(
    unknown_account=([], ["--account=nonsense"], ACCOUNT),
)
def test_norequeue_refuses(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    assert_refused(configuration, without, options, words)


@norequeue
def test_norequeue_preempted_with_notice(configuration: Configuration, sbatch: Callable[..., str], log: Path) -> None:
    """The step hears TERM and has its two minutes; only a job that was submitted with --requeue can be put back."""
    body = f"srun -n1 bash -c 'trap exit TERM; echo began >>{log}; {IDLE}'; echo heard >>{log};"
    body += f"scontrol requeue $SLURM_JOB_ID >>{log} 2>&1; echo requeue $? >>{log}"
    options = ["--exclusive", "--time=5"]
    plain = sbatch(*options, job=body)
    wait_until(lambda: log.read_text() == "began\n")
    sbatch("--partition=owner", "--nodes=2", "--exclusive", job="true")
    wait_until(lambda: log.read_text().endswith("requeue 1\n"))
    assert log.read_text() == f"began\nheard\nRequested operation is presently disabled for job {plain}\nrequeue 1\n"
    assert shown(configuration, "partition", "scavenge")["GraceTime"] == "120"
    wait_until(lambda: configuration.stack.run("sacct", "-nXP", "-j", plain, "-o", "state").stdout == "COMPLETED\n")
    asked = sbatch(*options, "--requeue")
    wait_until(lambda: running(configuration, asked))
    configuration.stack.run("scontrol", "requeue", asked)
    assert shown(configuration, "job", asked)["Restarts"] == "1"


@bare
def test_bare_runs_what_it_accepts(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    assert_takes_and_runs(configuration, sbatch)


@bare
@refusals(
    too_many_gpus=([], ["--gres=gpu:3"], NOT_AVAILABLE),
)
def test_bare_refuses(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    assert_refused(configuration, without, options, words)


@bare
@pytest.mark.parametrize(
    ("command", "words"),
    [("sacct", "Slurm accounting storage is disabled"), ("sacctmgr show assoc", "not running a supported accounting_storage plugin")],
)
def test_bare_has_no_accounting(configuration: Configuration, command: str, words: str) -> None:
    done = configuration.stack.run(*command.split(), check=False)
    assert done.returncode == 1 and words in done.stdout + done.stderr
    assert not (configuration.stack.root / "run" / "slurmdbd.pid").exists()


@bare
def test_bare_takes_what_can_never_run(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    job = sbatch("--account=nonsense", "--qos=nonsense")
    wait_until(lambda: running(configuration, job))
    assert shown(configuration, "job", job)["TimeLimit"] == "UNLIMITED"
    too_large = sbatch("--nodes=3")
    wait_until(lambda: pending_reason(configuration, too_large) == "PartitionConfig")


@untyped
def test_untyped_runs_what_it_accepts(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    assert_takes_and_runs(configuration, sbatch)


@untyped
@refusals(
    typed_gpu=([], ["--gres=gpu:a100:4"], NOT_AVAILABLE),
    too_long=([], ["--time=1-00:00:01"], TIME),
)
def test_untyped_refuses(configuration: Configuration, without: list[str], options: list[str], words: str) -> None:
    assert_refused(configuration, without, options, words)


@untyped
def test_untyped_whole_nodes_until_the_maintenance(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    short, long = sbatch("--time=05:00:00"), sbatch("--time=07:00:00")
    wait_until(lambda: running(configuration, short))
    wait_until(lambda: pending_reason(configuration, long) == "ReqNodeNotAvail,_Reserved_for_maintenance")
    assert shown(configuration, "job", short)["TRES"] == "cpu=48,node=1,billing=48,gres/gpu=4"
    assert shown(configuration, "reservation", "maintenance")["Flags"].startswith("MAINT,")


@untyped
def test_untyped_preempted_by_the_users_signal(configuration: Configuration, sbatch: Callable[..., str], log: Path) -> None:
    heard = f"trap 'echo USR2 >>{log}; exit' USR2; echo began >>{log}; {IDLE}"
    sbatch("--partition=preemptible", "--nodes=2", "--time=10", "--signal=B:USR2@30", job=heard)
    wait_until(lambda: log.read_text() == "began\n")
    sbatch("--nodes=2", job="true")
    wait_until(lambda: log.read_text() == "began\nUSR2\n")
    assert shown(configuration, "partition", "preemptible")["GraceTime"] == "60"


@untyped
def test_untyped_preempted_is_cancelled(configuration: Configuration, sbatch: Callable[..., str]) -> None:
    """Also a job that may be requeued. The partition's minute of grace is left out, to see the end of it at once."""
    env = {"PATH": "/usr/bin", "SLURM_CONF": str(configuration.stack.root / "etc" / "slurm.conf")}
    subprocess.run(["scontrol", "update", "PartitionName=preemptible", "GraceTime=0"], env=env, check=True)
    job = sbatch("--partition=preemptible", "--requeue", "--nodes=2", "--time=10")
    wait_until(lambda: running(configuration, job))
    sbatch("--nodes=2", job="true")
    wait_until(lambda: configuration.stack.run("sacct", "-nXP", "-j", job, "-o", "state").stdout == "PREEMPTED\n")


@default
def test_default_comes_back(configuration: Configuration) -> None:
    def facts() -> list[str]:
        words = ["config", "partition", "node"]
        text = "\n".join(configuration.stack.run("scontrol", "show", word).stdout for word in words)
        changing = ("Configuration data", "BOOT_TIME", "NEXT_JOB_ID", "BootTime", "LastBusyTime", "CPULoad", "FreeMem", "CPUAlloc", "OS=")
        return [line for line in text.splitlines() if not any(word in line for word in changing)]

    def slurmctld() -> str:
        return (configuration.stack.root / "run" / "slurmctld.pid").read_text()

    before, pid = facts(), slurmctld()
    subprocess.run([UP], check=True, stdin=subprocess.DEVNULL)
    assert slurmctld() == pid, "up restarts what needs no restart"
    subprocess.run([UP, "--configuration", "bare"], check=True, stdin=subprocess.DEVNULL)
    assert "ClusterName             = bare" in facts()
    subprocess.run([UP], check=True, stdin=subprocess.DEVNULL)
    assert facts() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--configuration", "nonsense"], "there is no configuration nonsense, only: bare default norequeue strict tacc untyped"),
        (["--configuration", "strict", "--job-requeue", "0"], "switch the default configuration only"),
    ],
)
def test_up_refuses(options: list[str], words: str) -> None:
    done = subprocess.run([UP, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr
