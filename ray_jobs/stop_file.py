"""How the distillation's driver asks its workers to end."""

import pyarrow.fs

from services.core.settings import Settings

RUN = "distill_student"  # the folder of the job's checkpoints, which the file lies beside
STOP = "stop"


class StopFile:
    """How the driver, which gets the SIGTERM, tells the workers, wherever they are."""

    def __init__(self, settings: Settings) -> None:
        uri = f"{settings.checkpoints}/{RUN}"
        self._fs: pyarrow.fs.FileSystem = pyarrow.fs.LocalFileSystem()
        self._directory = uri
        if "://" in uri:
            self._fs, self._directory = pyarrow.fs.FileSystem.from_uri(uri)
        self._path = f"{self._directory}/{STOP}"

    def set(self) -> None:
        self._fs.create_dir(self._directory, recursive=True)
        self._fs.open_output_stream(self._path).close()

    def clear(self) -> None:
        if self.is_set():
            self._fs.delete_file(self._path)

    def is_set(self) -> bool:
        found = self._fs.get_file_info(self._path).type
        return bool(found != pyarrow.fs.FileType.NotFound)
