"""Files out of the packages of TVM for a device's processor: from wheels that are given, or that pip downloads into a cache.

A wheel's RECORD lists the sha256 of each file; what does not fit it is refused. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvmtrain.errors import DeviceError, StorageError

# The newest platform of pip's names that TVM's wheels are made for, and its Python: any will do, as only C++ libraries are taken.
PLATFORM = "manylinux_2_28_{arch}"
PYTHON = "3.11"


@dataclass(frozen=True)
class Package:
    """A package of PyPI in one version."""

    name: str
    version: str

    def is_wheel(self, path: Path, arch: str) -> bool:
        """Whether the wheel ``path`` is, by its name, one of this package for the processor ``arch``."""
        parts = path.name.removesuffix(".whl").split("-")
        # For glibc, which devices have: musllinux is for another C library.
        fits = any(tag.startswith("manylinux") and tag.endswith(f"_{arch}") for tag in parts[-1].split("."))
        return parts[:2] == [self.name.replace("-", "_"), self.version] and path.suffix == ".whl" and fits


def find(package: Package, arch: str, given: Iterable[Path], cache: Path | None = None) -> Path:
    """The wheel of ``package`` for ``arch``: one of those ``given``, one in the folder ``cache``, else downloaded into it.

    Raises ``DeviceError`` where there is none, ``StorageError`` where the cache cannot be written.
    """
    for path in given:
        if package.is_wheel(path, arch):
            return path
    cache = cache or default_cache()
    if found := _in(cache, package, arch):
        return found
    _download(package, arch, cache)
    if found := _in(cache, package, arch):
        return found
    raise DeviceError(
        f"pip downloaded no wheel of {package.name} {package.version} for {arch} into {cache}; give one with --wheel"
    )


def check(packages: Iterable[Package], arch: str, given: Iterable[Path]) -> None:
    """Raise ``DeviceError`` naming a wheel among ``given`` that is none of ``packages`` for ``arch``: it would be left aside in silence."""
    wanted = list(packages)
    for path in given:
        if not any(package.is_wheel(path, arch) for package in wanted):
            names = " or ".join(f"{package.name} {package.version}" for package in wanted)
            raise DeviceError(
                f"{path}: want a wheel of {names} for manylinux on {arch}; leave it out and pip downloads the right one"
            )


def default_cache() -> Path:
    """Where wheels are kept: ``tvmtrain/wheels`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvmtrain" / "wheels"


def files(wheel: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files ``names`` of ``wheel``, each of which fits its RECORD. Raises ``DeviceError`` for one that is missing or damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            record = _record(archive)
            return {name: _checked(archive, name, record) for name in names}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DeviceError(f"{wheel}: {error}; the wheel is damaged or another one; download it again") from error


def licenses(wheel: Path) -> dict[str, bytes]:
    """The texts of the package's license: file name -> content."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if ".dist-info/licenses/" in name and not name.endswith("/")]
    return {name.partition(".dist-info/licenses/")[2].replace("/", "-"): text for name, text in files(wheel, found).items()}


def _in(cache: Path, package: Package, arch: str) -> Path | None:
    return next((path for path in sorted(cache.glob("*.whl")) if package.is_wheel(path, arch)), None)


def _download(package: Package, arch: str, cache: Path) -> None:
    """Into a folder beside, and then renamed: a download that was cut short is no wheel in the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wanted = ["--platform", PLATFORM.format(arch=arch), "--python-version", PYTHON, "--only-binary=:all:", "--no-deps"]
            command = [sys.executable, "-m", "pip", "download", *wanted, "-d", folder, f"{package.name}=={package.version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DeviceError(
                    f"pip cannot download {package.name} {package.version} for {arch}: {_last_error(done.stderr)}; "
                    f"give its wheel with --wheel FILE, or put it into {cache}"
                )
            for path in Path(folder).glob("*.whl"):
                os.replace(path, cache / path.name)
    except OSError as error:
        raise StorageError(f"cannot write {cache}: {error.strerror}; XDG_CACHE_HOME names another place") from error


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.strip().splitlines() or ["it says nothing"]
    return lines[-1]


def _record(archive: zipfile.ZipFile) -> dict[str, tuple[str, int]]:
    """(sha256 in URL-safe base64 without padding, size) of each file."""
    (name,) = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/RECORD")]
    rows = csv.reader(io.StringIO(archive.read(name).decode()))
    return {
        row[0]: (row[1].removeprefix("sha256="), int(row[2])) for row in rows if len(row) == 3 and row[1].startswith("sha256=")
    }


def _checked(archive: zipfile.ZipFile, name: str, record: Mapping[str, tuple[str, int]]) -> bytes:
    digest, size = record[name]
    if archive.getinfo(name).file_size != size:
        raise ValueError(f"{name} has {archive.getinfo(name).file_size} bytes, and RECORD says {size}")
    data = archive.read(name)
    if base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=") != digest:
        raise ValueError(f"{name} does not fit its sha256 in RECORD")
    return data
