"""Optional packages: imported when needed; an error says how to install a missing one."""

from __future__ import annotations

import importlib.util
from typing import Any

from medusa.errors import InvalidInput


def require(module: str, extra: str, what: str) -> Any:
    """The module of an optional package, imported; InvalidInput, which names what needs it and the extra that installs it, if
    it is missing."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise InvalidInput(f"{what} needs {package}: pip install 'medusa-decoding[{extra}]'")
    return importlib.import_module(module)
