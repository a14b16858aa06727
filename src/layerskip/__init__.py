"""Make a language model draft for itself: exact self-speculative decoding with early exits.

    import layerskip
    lm = layerskip.load("smollm2-135m")
    print(lm.generate("The capital of France is", max_new_tokens=32).text)

Names are loaded when first used: `import layerskip` imports no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
