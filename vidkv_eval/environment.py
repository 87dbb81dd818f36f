"""What a number was measured with: versions, hardware, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "lmms-eval", "decord", "numpy", "optimum-quanto", "hqq")


def describe_environment(root: Path, *, device: str, threads: int) -> dict:
    """Describe this machine and this installation, without importing torch.

    Args:
        root: folder of the checkout, for commit and state of the working tree.
        device: device that the model ran on.
        threads: threads of one worker.
    Returns:
        A dictionary of plain values; what is not known is None.
    """
    return {
        "python": platform.python_version(),
        "packages": {package: package_version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "device": device,
        "gpu": visible_gpu() if device.startswith("cuda") else None,
        "commit": git(root, "rev-parse", "HEAD"),
        "dirty": is_dirty(root),
    }


def package_version(package: str) -> str | None:
    """Return the installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the marketing name of the processor where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return "name, driver version" of every GPU that nvidia-smi lists, in its order."""
    return (output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()


def visible_gpu() -> str | None:
    """Return "name, driver version" of the GPU this process was given."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    names = gpu_names()
    if index.isdigit() and int(index) < len(names):
        return names[int(index)]
    return names[0] if names else None


def is_dirty(root: Path) -> bool | None:
    """Say whether the checkout differs from its commit; recorded results do not count, they are output."""
    status = git(root, "status", "--porcelain", "--", ".", ":(exclude)results")
    return None if status is None else bool(status)


def git(root: Path, *arguments: str) -> str | None:
    """Return what git prints about a folder, None where it is no checkout or has no commit."""
    return output_of("git", "-C", str(root), *arguments)


def output_of(*command: str) -> str | None:
    """Run a command and return its output, None where it is missing or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
