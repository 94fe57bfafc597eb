"""Optional packages: imported when they are needed, and named with the way to install them when they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from medusa.errors import InvalidInput


def require(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: the module's full name, such as `matplotlib.figure`.
        extra: the extra of `medusa-decoding` that installs it.
        what: what needs it, in the singular, for the error.

    Raises:
        InvalidInput: the package is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InvalidInput(f"{what} needs {package}: pip install 'medusa-decoding[{extra}]'") from None
