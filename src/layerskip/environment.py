"""What this machine offers: versions, devices, dtypes, the cache folder."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def environment() -> dict[str, Any]:
    """Collect the facts a bug report needs."""
    import torch

    import layerskip
    from layerskip.model import hub

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
        "layerskip": layerskip.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{
            package: installed(package)
            for package in ("torch", "transformers", "safetensors", "tokenizers", "gguf")
        },
        "devices": devices,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": torch.get_num_threads(),
        "cpu dtypes, fast": native,
        "cpu dtypes, emulated": [name for name in ("bfloat16", "float16") if name not in native],
        "cuda bfloat16": bool(cuda and torch.cuda.is_bf16_supported()),
        "cache folder": str(hub.cache_folder()),
    }
