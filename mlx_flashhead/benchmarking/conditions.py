"""What makes a machine slower than it is: battery, heat, other work."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

Ask = Callable[[list[str]], str]

# Load of others, in busy cores per core, from which on it is mentioned.
BUSY = 0.25
# Bits of nvidia-smi's clocks_event_reasons.active.
_SLOWED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat, software",
    0x40: "heat, hardware",
    0x80: "power brake",
}


def ask(command: list[str]) -> str:
    """What a command prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def warnings(
    ask: Ask = ask,
    system: str | None = None,
    power_supply: Path = Path("/sys/class/power_supply"),
    load: Callable[[], tuple[float, float, float]] = os.getloadavg,
    cores: int | None = None,
    before: bool = True,
) -> list[str]:
    """What can be seen now that makes measurements slower, a line each.

    Args:
        ask: Runs a command and gives what it prints.
        system: As ``platform.system`` has it.
        power_supply: Where Linux tells of batteries.
        load: The load average.
        cores: Cores of the machine.
        before: Whether the measurements are still to come: afterwards the load is
            their own.
    """
    system = system or platform.system()
    found = _mac(ask) if system == "Darwin" else _linux(power_supply)
    found += _nvidia(ask)
    if before:
        cores = cores or os.cpu_count() or 1
        busy = load()[0]
        if busy > BUSY * cores:
            found.append(
                f"the machine is busy: load average {busy:.1f} on {cores} cores"
            )
    return found


def _mac(ask: Ask) -> list[str]:
    found = []
    if "'Battery Power'" in ask(["pmset", "-g", "batt"]):
        found.append("running on battery power")
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", therm := _therm(ask))
    if limit and int(limit[1]) < 100:
        found.append(f"thermal pressure: the CPU is held to {limit[1]} % of its speed")
    level = re.search(r"thermal warning level:?\s*(?:=\s*)?(\d+)", therm, re.I)
    if level and int(level[1]) > 0:
        found.append(f"thermal pressure: warning level {level[1]}")
    if re.search(r"\b(low)?powermode\s+1\b", ask(["pmset", "-g"])):
        found.append("low power mode is on")
    return found


def _therm(ask: Ask) -> str:
    return ask(["pmset", "-g", "therm"])


def _linux(power_supply: Path) -> list[str]:
    def read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    supplies = sorted(power_supply.iterdir()) if power_supply.is_dir() else []
    for supply in supplies:
        discharging = read(supply / "status") == "Discharging"
        # A mouse has a battery, too.
        own = read(supply / "scope") != "Device"
        if read(supply / "type") == "Battery" and discharging and own:
            return ["running on battery power"]
    return []


def _nvidia(ask: Ask) -> list[str]:
    found = []
    for field in ("clocks_event_reasons", "clocks_throttle_reasons"):
        query = ["nvidia-smi", f"--query-gpu={field}.active", "--format=csv,noheader"]
        masks = re.findall(r"0x[0-9a-fA-F]+", ask(query))
        for i, mask in enumerate(masks):
            why = [name for bit, name in _SLOWED.items() if int(mask, 16) & bit]
            if why:
                found.append(f"GPU {i} is slowed: {', '.join(why)}")
        if masks:
            break
    return found
