"""How long the main job takes on this machine, and how much memory: wall time of every stage and peak of all processes.

    python scripts/bench_table1.py [OUTPUT.md] [SUITE]

Measures the suite (table1) of the mini profile from nothing in a temporary folder, then once more with everything done.
"""

import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from vidkv_eval.environment import describe_environment

PROJECT = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN_SAMPLES = 0.5


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command; return its wall time in seconds and the peak of the memory of all its processes in bytes.

    The peak is the largest sum of unique (not shared) memory seen, sampled twice a second.
    """
    peak = 0
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
    ended = threading.Event()
    threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
    while not ended.wait(SECONDS_BETWEEN_SAMPLES):
        peak = max(peak, sum(map(unique_bytes, [psutil.Process(process.pid), *_children(process.pid)])))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.perf_counter() - started, peak


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def unique_bytes(process: psutil.Process) -> int:
    """Memory that only this process holds; 0 for one that has just ended."""
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    suite = sys.argv[2] if len(sys.argv) > 2 else "table1"
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
        command = [sys.executable, "-m", "vidkv_eval.cli", "reproduce", suite, *folders]
        first, peak = timed(command)
        second, _ = timed(command)
        cells = len(list(Path(folder, "runs").glob("*/cells/*/*/*/scores.json")))
    environment = describe_environment(PROJECT, device="cpu", threads=1)
    lines = [
        f"# Cost of `vidkv reproduce {suite}` on the mini profile",
        "",
        "| from nothing | with everything done | peak memory of all processes | cells |",
        "| --- | --- | --- | --- |",
        f"| {first:.0f} s | {second:.1f} s | {peak / 2**30:.2f} GiB | {cells} |",
        "",
        f"- Hardware: {environment['cpu']}, {psutil.cpu_count()} cores",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in environment['packages'].items())}",
        f"- Measured: {datetime.now(UTC).date()}, one run; made by `make bench`",
    ]
    print("\n".join(lines))
    if output:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
