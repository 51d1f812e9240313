"""Trinity: sparse mixture-of-experts language models, from text to a served model.

import trinity

model, tokenizer = trinity.load("runs/demo/pretrain")
print(trinity.generate(model, tokenizer, "The sea", max_new_tokens=32, temperature=0.0))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trinity.config import RunConfig as RunConfig
    from trinity.infer.generate import generate as generate
    from trinity.infer.load import load as load

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "generate", "load"]

_HOMES = {"RunConfig": "trinity.config", "generate": "trinity.infer.generate", "load": "trinity.infer.load"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import trinity` itself loads neither torch nor pydantic."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trinity' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
