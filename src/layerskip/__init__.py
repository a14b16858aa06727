"""Make a language model draft for itself: exact self-speculative decoding with early exits.

    import layerskip
    lm = layerskip.load("smollm2-135m")
    print(lm.generate("The capital of France is", max_new_tokens=32).text)

Names are loaded when first used: `import layerskip` imports no torch.
"""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerskip.adapt import train_adapter
    from layerskip.decode.chat import Chat
    from layerskip.decode.generation import Generation
    from layerskip.decode.hf_generate import custom_generate, custom_generate_with
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.load import generate, load
    from layerskip.decode.request import Round
    from layerskip.errors import UserError

_HOMES = {
    "Chat": "layerskip.decode.chat",
    "Generation": "layerskip.decode.generation",
    "LanguageModel": "layerskip.decode.language_model",
    "Round": "layerskip.decode.request",
    "UserError": "layerskip.errors",
    "custom_generate": "layerskip.decode.hf_generate",
    "custom_generate_with": "layerskip.decode.hf_generate",
    "generate": "layerskip.decode.load",
    "load": "layerskip.decode.load",
    "train_adapter": "layerskip.adapt",
}

__all__ = [
    "Chat",
    "Generation",
    "LanguageModel",
    "Round",
    "UserError",
    "custom_generate",
    "custom_generate_with",
    "generate",
    "load",
    "train_adapter",
]

try:
    __version__ = version("layerskip")
except PackageNotFoundError:  # used straight from a source tree
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerskip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_FORMER = {  # documented modules of 0.1 that have moved; gone in 0.3
    "layerskip.model.hub": "layerskip.checkpoint.resolve",
    "layerskip.train.exits": "layerskip.train.objective.exits",
    "layerskip.train.recipe": "layerskip.train.job.recipe",
    "layerskip.train.run": "layerskip.train.job.run",
    "layerskip.train.schedule": "layerskip.train.objective.schedule",
}


class _FormerNames:
    """Find modules under their former names too, with a warning: the very module, not a copy."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _FORMER else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        moved = _FORMER[module.__name__]
        warnings.warn(f"{module.__name__} is now {moved}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(moved)


sys.meta_path.append(_FormerNames())
