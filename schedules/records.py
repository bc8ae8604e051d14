"""What tuning found out, kept: for each kernel of a device the decisions that were fastest there.

    <folder>/<device>/records.jsonl   first what they were made for, then one kernel a line
    <folder>/<device>/origin.toml     the same for people, with the command and the date

A kernel is known by its loops as they were before any schedule, whatever its name. Its decisions are numbers of options of the
templates (``schedules.decisions``): applied to a kernel that has changed, they still are a correct schedule.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from tvm import tirx
from tvm_ffi import structural_hash

from tvmtrain import artifact
from tvmtrain.errors import DeviceError, StorageError
from tvmtrain.schedules.decisions import OPTIONS, VERSION, Decisions, valid
from tvmtrain.targets import Device

# A folder for records in place of this package's own.
VARIABLE = "TVMTRAIN_RECORDS"
RECORDS, ORIGIN = "records.jsonl", "origin.toml"


@dataclass(frozen=True)
class Record:
    """kernel: ``key_of`` its PrimFunc. us: microseconds of one call with ``decisions``, default_us: with the defaults, in turns."""

    kernel: str
    name: str
    decisions: Decisions
    us: float
    default_us: float
    trials: int


@dataclass(frozen=True)
class Records:
    """The records of one device, by kernel."""

    by_kernel: dict[str, Record] = field(default_factory=dict)

    def decisions(self, function: tirx.PrimFunc) -> Decisions:
        """What is best for a PrimFunc that has no schedule yet; the defaults where nothing is known."""
        found = self.by_kernel.get(key_of(function)) if self.by_kernel else None
        return found.decisions if found is not None else Decisions()


def key_of(function: tirx.PrimFunc) -> str:
    """The name of a kernel's loops: equal for equal loops, in every process."""
    plain = tirx.PrimFunc(function.params, function.body, function.ret_type)
    return f"{structural_hash(plain, map_free_vars=True) & (2**64 - 1):016x}"


def folder_of(device: Device) -> Path:
    """Where the records of ``device`` lie, or would."""
    return Path(os.environ.get(VARIABLE) or Path(__file__).parent) / device.name


def conditions(device: Device) -> dict[str, Any]:
    """What has to be the same for a record to be worth anything."""
    target = {key: str(value) for key, value in device.target.items()}
    return {"tvm": metadata.version("apache-tvm"), "templates": VERSION, "cores": device.cores, "target": target}


def fingerprint(device: Device) -> str:
    """Eight digits that are others under other conditions."""
    return sha256(json.dumps(conditions(device), sort_keys=True).encode()).hexdigest()[:8]


def load(device: Device) -> Records:
    """The records of ``device``; none, and a warning, where they were made under other conditions.

    Raises ``DeviceError`` for a file that is damaged.
    """
    path = folder_of(device) / RECORDS
    try:
        written = path.stat().st_mtime_ns
    except OSError:
        return Records()
    made_for, records = _read(path, written)
    wanted = conditions(device)
    if different := {name: value for name, value in wanted.items() if made_for.get(name) != value}:
        got = {name: made_for.get(name) for name in different}
        warnings.warn(f"{path}: made for {got}, and this is {different}: not used; tune again", stacklevel=2)
        return Records()
    return Records({record.kernel: record for record in records})


@cache
def _read(path: Path, _written: int) -> tuple[dict[str, Any], tuple[Record, ...]]:
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        made_for = json.loads(first)
        if not isinstance(made_for, dict):
            raise ValueError(f"got {first[:40]!r}, wanted an object")
        return made_for, tuple(map(_parse, rest)) if made_for.get("templates") == VERSION else ()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DeviceError(f"{path} is damaged: {error}; delete it, or tune again") from error


def _parse(line: str) -> Record:
    values = json.loads(line)
    kinds = {"kernel": str, "name": str, "decisions": list, "us": float, "default_us": float, "trials": int}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        raise ValueError(f"got {line[:60]!r}, wanted a record with {', '.join(kinds)}")
    if not valid(values["decisions"]):
        raise ValueError(f"decisions: got {values['decisions']}, wanted numbers below {OPTIONS}")
    return Record(**values | {"decisions": Decisions(*values["decisions"])})


def save(device: Device, records: Iterable[Record], about: dict[str, Any]) -> Path:
    """Write all records of ``device``, in place of those that were there; ``about`` is for people: command, date, trials.

    Raises ``StorageError``; the old records are intact then.
    """
    folder = folder_of(device)
    lines = [conditions(device)]
    lines += [asdict(r) | {"decisions": astuple(r.decisions)} for r in sorted(records, key=lambda r: r.name)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    artifact.write_file(folder / RECORDS, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    artifact.write_file(folder / ORIGIN, _toml(about | conditions(device)).encode())
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against it becomes a ``StorageError`` that tells where else to write."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; set {VARIABLE} to a folder that can be written") from error


def _toml(values: dict[str, Any]) -> str:
    """Strings and numbers, then tables of them; JSON's strings are TOML's."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    tables = [f"\n[{name}]\n{_toml(value)}" for name, value in values.items() if isinstance(value, dict)]
    return "\n".join([*plain, *tables]) + "\n"
