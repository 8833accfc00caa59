"""Which Ray is ours, where several run on one machine, and how far our processes there step back.

Ray Train leaves a detached actor behind each run that looks whether the run's controller still
lives, and takes its workers' resources away once it doesn't. That actor asks the Ray that
`RAY_ADDRESS` or `RAY_API_SERVER_ADDRESS` names, else whichever it finds on the machine; another
Ray knows of no such controller, and a training in good health is ended. So both are said here.
"""

import os
from typing import Final

import ray

NOWHERE: Final = "http://127.0.0.1:9"  # the discard port: a question there fails, and ends nothing


def join(*, log_to_driver: bool = True) -> None:
    """Connect a job to the Ray that it was submitted to (`RAY_ADDRESS`), and all of its actors.

    A job that was started by `nice` has its workers start as far back as itself.
    """
    if ray.is_initialized():
        return
    env_vars = {}
    if address := os.environ.get("RAY_ADDRESS"):
        env_vars["RAY_ADDRESS"] = address
    if niceness := os.nice(0):
        env_vars["RAY_worker_niceness"] = str(niceness)
    ray.init(runtime_env={"env_vars": env_vars}, log_to_driver=log_to_driver)


def step_back(niceness: int) -> None:
    """Leave the cores to others: from here on this process has at least that niceness.

    A cluster's workers start at 15, and only root may come forward again.
    """
    os.nice(max(0, niceness - os.nice(0)))


def start(*, num_cpus: int | None = None) -> None:
    """Start a Ray on this machine for this process alone, without a dashboard."""
    # By default it would write a token into the home folder, which later ones then demand.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_API_SERVER_ADDRESS"] = NOWHERE  # ours has no API server, others' must not do
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
