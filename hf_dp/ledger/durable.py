"""Files that survive a kill: whole or not there, and on the disk before anyone relies on them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_dp.errors import LedgerError, explain


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a LedgerError that says what to do."""
    try:
        yield
    except OSError as error:
        raise LedgerError(
            explain(
                "Ledger.path",
                str(path),
                "a file that can be read and written, on a disk with space",
                f"It was not possible to {doing}: {error.strerror or error}.",
                "Free space, repair the permissions, or choose another output_dir.",
            )
        ) from error


def real_path(path: str | os.PathLike[str]) -> Path:
    """The file itself: replacing a symbolic link would leave the file behind it untouched."""
    return Path(os.path.realpath(path))


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: a folder, or a pipe, which could block for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the file inside it")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file."""
    check_regular(path)
    return path.read_bytes()


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`: in one call, or in more where the system takes less at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, durably."""
    missing = [level for level in (folder, *folder.parents) if not level.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for level in missing:
        _sync_folder(level.parent)


def remove_unfinished(path: Path) -> Path:
    """Remove what a kill in the middle of `write_file` left beside `path`; returns its name.

    It may be a second name of `path` itself, so it must be removed, never overwritten.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    return temporary


def write_file(path: Path, data: bytes, *, replace: bool) -> None:
    """Put a file in place, so that at any instant there is the old one or the whole new one.

    Args:
        path: where; only one process at a time may write it.
        data: the whole content.
        replace: whether a file that is there already may be replaced.

    Raises:
        FileExistsError: if there is one and it may not.
    """
    temporary = remove_unfinished(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links; the caller's lock keeps other writers out.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists", str(path)) from None
        os.rename(temporary, path)
    else:
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
