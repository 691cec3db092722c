"""What a GPU benchmark was measured on."""

from __future__ import annotations

import subprocess

import torch

from ..machine import machine

_ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "persistence_mode")


def gpu_machine() -> dict[str, str]:
    """Returns what `machine` says of the host, and the device, its driver and limits, the toolkit and cuDNN."""
    device = torch.cuda.get_device_properties()
    return {
        "GPU": f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, {device.total_memory / 2**30:.0f} GiB, "
        f"L2 {device.L2_cache_size / 2**20:.0f} MiB",
        "driver": _driver(),
        "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        **machine(),
    }


def _driver() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no nvidia-smi"
    return ", ".join(f"{name} {value}" for name, value in zip(_ASKED, answer.split(", "), strict=False))
