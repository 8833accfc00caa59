"""How a job's processes give way."""

import subprocess
import sys


def test_stepping_back_is_never_a_step_forward() -> None:
    tell = "import os; from ray_jobs.own_ray import step_back"
    for niceness in (3, 7):
        tell += f"; step_back({niceness}); print(os.nice(0))"
    done = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-c", tell], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["5", "7"]
