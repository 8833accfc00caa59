"""Deploy the answers on the settings' Ray and wait until they run.

    python -m services.recommend

Exits 0 once they answer, else 1 with the reason. REFLUX_RAY_ADDRESS says where, deploy/serve.yaml
what; the replicas live on Ray and outlive this command.
"""

import sys
from typing import Final

from services.core.errors import RefluxError
from services.core.settings import Settings
from services.recommend.deploy import deploy

NAMES: Final = {"haproxy": "HAProxy", "python": "Serve's Python proxy"}


def main() -> int:
    try:
        settings = Settings.load()
        deployed = deploy(settings)
    except RefluxError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    url = deployed.url
    sys.stdout.write(
        f"answers at {url}/v1/recommendations, described at {url}/docs, "
        f"behind {NAMES[deployed.proxy]}\n"
    )
    if deployed.proxy != settings.proxy:
        sys.stderr.write(
            f"REFLUX_PROXY={settings.proxy}, but this Ray was started for the {deployed.proxy} "
            "proxy; HAProxy, at a fraction of the CPU, needs RAY_SERVE_ENABLE_HA_PROXY=1 "
            "and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in the environment of `ray start`\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
