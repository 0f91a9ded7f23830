"""The code of LLM Atlas, a book on large language models: every part that it teaches, in layers.

Importing the package is cheap: a subpackage (`llm_atlas.nn`, `llm_atlas.text`, ...) is imported when it is
first touched, and PyTorch with it only if that subpackage computes.
"""

import importlib
import importlib.metadata
import pkgutil

try:
    __version__ = importlib.metadata.version("llm-atlas")
except importlib.metadata.PackageNotFoundError:  # on sys.path without being installed
    __version__ = "0+unknown"


def _children() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str):
    # The underscore test keeps probes such as hasattr(llm_atlas, "__wrapped__") away from the disk.
    if not name.startswith("_") and name in _children():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_children()})
