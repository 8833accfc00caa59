"""Which Ray is ours, where several run on one machine, and who steps back for whom there.

Ray Train leaves a detached actor behind each run that looks whether the run's controller still
lives, and takes its workers' resources away once it doesn't. That actor asks the Ray that
`RAY_ADDRESS` or `RAY_API_SERVER_ADDRESS` names, else whichever it finds on the machine; another
Ray knows of no such controller, and a training in good health is ended. So both are said here.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import ray

NOWHERE: Final = "http://127.0.0.1:9"  # the discard port: a question there fails, and ends nothing


def join(*, niceness: int = 0, log_to_driver: bool = True) -> None:
    """Connect a job to the Ray that it was submitted to (`RAY_ADDRESS`), and all of its actors.

    `niceness`: of the job's processes from their first import on; 0: whatever that Ray's is.
    """
    if ray.is_initialized():
        return
    env_vars = {}
    if address := os.environ.get("RAY_ADDRESS"):
        env_vars["RAY_ADDRESS"] = address
    if niceness:
        env_vars["RAY_worker_niceness"] = str(niceness)
    ray.init(runtime_env={"env_vars": env_vars}, log_to_driver=log_to_driver)


def step_back(niceness: int) -> None:
    """Leave the cores to others: from here on this process has at least that niceness.

    A cluster's workers start at 15, and only root may come forward again.
    """
    os.nice(max(0, niceness - os.nice(0)))


def step_back_as_driver(niceness: int) -> None:
    """The same for a submitted job's driver.

    Linux weighs sessions against each other before the processes in them, and Ray gives each driver
    a session of its own, where niceness alone has nobody to give way to.
    """
    step_back(niceness)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        with suppress(OSError):  # another system, or a kernel without automatic groups
            Path("/proc/self/autogroup").write_text(str(niceness))


def start(*, num_cpus: int | None = None) -> None:
    """Start a Ray on this machine for this process alone, without a dashboard."""
    # By default it would write a token into the home folder, which later ones then demand.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_API_SERVER_ADDRESS"] = NOWHERE  # ours has no API server, others' must not do
    # By default as many processes start at a time as there are cores, and Ray warns of the others.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
