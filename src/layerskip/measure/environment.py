"""What this machine offers: versions, devices, dtypes, the cache folder."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Collect the facts a bug report needs."""
    from layerskip.checkpoint.files import cache_folder
    from layerskip.model.native.kernels import kernels_reason

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    cuda = torch.cuda.is_available()
    devices = [
        "cpu",
        *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    native = ["float64", "float32"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        native.append("bfloat16")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        native.append("float16")
    return {
        "layerskip": installed("layerskip"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{
            package: installed(package)
            for package in ("torch", "transformers", "safetensors", "tokenizers", "gguf")
        },
        "devices": devices,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": torch.get_num_threads(),
        "compiled kernels": kernels_reason() or "ready",
        "cpu dtypes, fast": native,
        "cpu dtypes, emulated": [name for name in ("bfloat16", "float16") if name not in native],
        "cuda bfloat16": bool(cuda and torch.cuda.is_bf16_supported()),
        "cache folder": str(cache_folder()),
    }


def device_name(device: torch.device) -> str:
    """Name the processor, as a result file should."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
