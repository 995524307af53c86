"""Files that are written whole or not at all."""

import os
from pathlib import Path


class whole_or_nothing:
    """Context that hands out a temporary name beside ``path``.

    Renamed to ``path`` on success, removed on failure, so a reader never sees half a file.

    Raises: OSError: the disk is full or not writable, with the file's name; ``path`` is untouched.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with whole_or_nothing(path) as part:
    ...     _ = part.write_text("all of it")
    >>> path.read_text()
    'all of it'
    """

    def __init__(self, path: Path):
        self.path = path
        self.part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if kind is None:
            os.replace(self.part, self.path)
            return
        self.part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"could not write {self.path} ({error.strerror}); nothing recorded was changed",
            ) from error
