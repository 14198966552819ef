"""A user's own functions in the settings: given as they are, or by import path.

Used by divergences (`custom.py`), token weightings (`weighting.py`) and reward functions (`data/rewards.py`).
"""

from __future__ import annotations

import functools
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Self


class NamedFunction(str):
    """
    The name of a user's function, which carries the function.

    It is a string, so that settings are saved and logged as with any other name. A copy keeps the function; a pickled
    one is imported again by its name, and is a plain string if that fails.

    Attributes:
        what (`str`): what the function is, for messages.
        how (`str`): how to write one, for messages.
        function (`Callable`): the function.
    """

    what: ClassVar[str] = "function"
    how: ClassVar[str] = ""
    function: Callable[..., Any]

    def __new__(cls, name: str, function: Callable[..., Any]) -> Self:
        self = super().__new__(cls, name)
        self.function = function
        return self

    @classmethod
    def from_value(cls, value: Any) -> Self | None:
        """
        From a function or an import path such as `my_module.my_function`; `None` for anything else.

        Raises:
            ValueError: the path cannot be imported, or names something that cannot be called.
        """
        if isinstance(value, str) and ("." in value or ":" in value):
            return cls(value.replace(":", "."), cls._imported(value))
        return cls(name_of(value), value) if callable(value) else None

    @classmethod
    def _imported(cls, path: str) -> Callable[..., Any]:
        function = import_by_path(path, cls.what)
        if not callable(function):
            raise ValueError(f"The {cls.what} {path!r} is no function, but {function!r:.100}. {cls.how}")
        return function

    @classmethod
    def _unpickled(cls, name: str) -> str:
        try:
            return cls(name, cls._imported(name))
        except ValueError:  # settings can be read without the module that they name
            return name

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._unpickled, (str(self),)


def import_by_path(path: str, what: str, default_module: str | None = None) -> Any:
    """
    The object with this import path; the current directory is searched too.

    Args:
        path (`str`): "module.name" or "module:name".
        what (`str`): what it is, for messages, such as "divergence".
        default_module (`str`, *optional*): the module of a name without one.

    Raises:
        ValueError: there is none.
    """
    bare = "." not in path and ":" not in path
    sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(f"{default_module}.{path}" if bare and default_module else path)
    except (ImportError, AttributeError, ValueError) as error:
        other = f", or the name of a function in `{default_module}`" if default_module else ""
        raise ValueError(
            f"The {what} {path!r} could not be imported ({error}). Write `module.function`, importable from the "
            f"current directory{other}."
        ) from None
    finally:
        sys.path.pop(0)


def name_of(function: Any) -> str:
    """Its import path; with the values that are bound to it, if it is no plain function, so that none is mistaken."""
    if isinstance(function, functools.partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(bound)})"
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    return f"{type(function).__module__}.{type(function).__qualname__}()"
