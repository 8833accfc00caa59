"""A disk of a few megabytes under a folder, so that it can be full while nothing else is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from services.core.errors import RefluxError

DISK_MB: Final = 128  # the log of an hour at 100 events/s, and fifty small students
FILLER: Final = ".filler"


def may_mount() -> None:
    """Go on as who may mount. Not root: run this very command again in a namespace of our own,
    where we are; `RefluxError` where the kernel doesn't let us."""
    if os.geteuid() == 0:
        return
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.call([unshare, "-rm", "true"]) != 0:
        raise RefluxError(
            "a full disk is a small tmpfs that is mounted: run this as root, or allow user "
            "namespaces (sysctl kernel.unprivileged_userns_clone=1), or name other faults (--fault)"
        )
    command = [sys.executable, "-m", "services.cli", *sys.argv[1:]]
    os.execv(unshare, [unshare, "-rm", *command])


class SmallDisk:
    """A tmpfs on `folder`, between `mount` and `unmount`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mount(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self._folder))

    def fill(self) -> None:
        """Leave no byte."""
        with (self._folder / FILLER).open("wb", buffering=0) as filler:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        filler.write(bytes(size))
                except OSError:  # as was meant
                    continue

    def free(self) -> None:
        (self._folder / FILLER).unlink(missing_ok=True)

    def unmount(self) -> None:
        """What is on it stays in `folder`, for whoever looks into what went wrong."""
        aside = self._folder.with_name(f"{self._folder.name}-kept")
        shutil.copytree(self._folder, aside)
        _run("umount", "--lazy", str(self._folder))
        shutil.rmtree(self._folder)
        aside.rename(self._folder)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RefluxError(f"{' '.join(command)}: {done.stderr.strip()}; run this as root")
