"""Small disks: file systems in memory, which a drill mounts where it may."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


class CannotMount(Exception):
    """This process may not mount a file system."""


@contextlib.contextmanager
def disk(directory: Path, kib: int) -> Iterator[Path]:
    """A file system of that size, unmounted in the end. Raises CannotMount."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise CannotMount
    try:
        yield directory
    finally:
        while not subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False).returncode:
            pass


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True, capture_output=True)


def size_of(directory: Path) -> int:
    """In pages of 4 KiB, as a disk counts."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in directory.rglob("*") if path.is_file())
