"""Optional packages: imported when needed; an error says how to install a missing one."""

from __future__ import annotations

import importlib.util
from typing import Any

from medusa.errors import InvalidInput


def require(module: str, extra: str, what: str) -> Any:
    """The module of an optional package, imported.

    Args:
        module: the module's full name, such as `matplotlib.figure`.
        extra: the extra of `medusa-decoding` that installs it.
        what: what needs it, in the singular, for the error.

    Raises:
        InvalidInput: the package is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise InvalidInput(f"{what} needs {package}: pip install 'medusa-decoding[{extra}]'")
    return importlib.import_module(module)
