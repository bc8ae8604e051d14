"""What systems tell of their memory, in files, and how many bytes that is: of boards, and of containers on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MEMINFO = "MemTotal:        2000 kB\nMemFree:          100 kB\nMemAvailable:    1500 kB\nCached: 7 kB\n"
STAT = "anon 1\ninactive_anon 300000\ninactive_file 400000\nactive_file 5\n"
ALL, FREE = 2000 * 1024, 1500 * 1024


@dataclass(frozen=True)
class Machine:
    """Files of /proc and of its group of processes by name, and the bytes of memory that they tell."""

    name: str
    total: int
    available: int
    meminfo: str | None = MEMINFO
    group: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        """``root`` with these files in it."""
        groups = root / "sys/fs/cgroup"
        for folder in (groups, root / "proc"):
            folder.mkdir(parents=True)
        if self.meminfo is not None:
            (root / "proc/meminfo").write_text(self.meminfo)
        for name, text in self.group.items():
            (groups / f"memory.{name}").write_text(text)
        return root


MACHINES = (
    Machine("board", ALL, FREE),
    Machine("unknown", 0, 0, None),
    Machine("old-system", ALL, 0, MEMINFO.replace("MemAvailable", "Nothing")),
    Machine("container-without-limit", ALL, FREE, group={"max": "max\n", "current": "900000\n", "stat": STAT}),
    Machine("limit-above-all", ALL, FREE, group={"max": "9000000\n", "current": "900000\n", "stat": STAT}),
    Machine("container", 1_000_000, 500_000, group={"max": "1000000\n", "current": "900000\n", "stat": STAT}),
    Machine("container-of-an-unknown", 1_000_000, 500_000, None, {"max": "1000000", "current": "900000", "stat": STAT}),
    Machine("full-container", 1_000_000, 1, group={"max": "1000000\n", "current": "2000000\n", "stat": "inactive_file 5\n"}),
    Machine("container-on-a-full-board", 1_800_000, 1024, MEMINFO.replace("1500", "1"), {"max": "1800000", "current": "0"}),
    Machine("cached-files-alone", 1_000_000, 1_000_000, group={"max": "1000000\n", "current": "300000\n", "stat": STAT}),
)
