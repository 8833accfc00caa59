"""The Ray that a job runs on, and who steps back for whom there."""

import os
from contextlib import suppress
from pathlib import Path

import ray


def join(*, niceness: int = 0, log_to_driver: bool = True) -> None:
    """Connect a job to the Ray that it was submitted to.

    `niceness`: of the job's processes from their first import on; 0: whatever that Ray's is.
    """
    if ray.is_initialized():
        return
    env_vars = {"RAY_worker_niceness": str(niceness)} if niceness else {}
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
    # By default as many processes start at a time as there are cores, and Ray warns of the others.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
