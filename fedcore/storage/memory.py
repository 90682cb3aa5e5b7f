"""How much memory there is, for work whose need is known before it starts; and bytes in words."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from fedcore.errors import SettingsError

CGROUP = Path("/sys/fs/cgroup")  # version 2: where a container's own limit stands


def available(device: torch.device) -> int:
    """Bytes that this process can still take on `device`; of a container's memory, where that is less than the machine's."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by PyTorch, and free
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            (CGROUP / "memory.max").read_text(),
            int((CGROUP / "memory.current").read_text()),
        )
        stat = dict(
            line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()
        )
    except OSError:
        return free
    used -= int(stat.get("inactive_file", 0))  # page cache, which the kernel gives back
    return free if limit.strip() == "max" else min(free, max(int(limit) - used, 0))


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes in one unit, its name) for numbers up to `largest` bytes."""
    return next(
        (
            (size, name)
            for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
            if largest >= size
        ),
        (1.0, "B"),
    )


def size_text(n: float) -> str:
    """`3.2 GB`"""
    size, name = byte_unit(n)
    return f"{n / size:.3g} {name}" if n < 999.5 * size else f"{n / size:,.0f} {name}"


def require(need: int, device: torch.device, what: str) -> str:
    """`what` with its size, for the user to read. Raises SettingsError where `need` bytes are not there."""
    have = available(device)
    if need > have:
        raise SettingsError(
            f"{what}: {size_text(need)} of memory on {device.type}, but {size_text(have)} are free"
        )
    return f"{what}: {size_text(need)} of memory on {device.type}"
