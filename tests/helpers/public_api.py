"""Public names and signatures, as ``tests/public_api.json`` records them.

After a deliberate change: ``PYTHONPATH=tests python -m helpers.public_api > tests/public_api.json``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from typing import Any

PACKAGES = ("caop_fast", "caop_fast.losses", "caop_fast.calibration", "caop_fast.caop", "caop_fast.training")


def parameters(value: Any) -> str:
    """Names, kinds and defaults of a callable's parameters; annotations may be refined."""
    signature = inspect.signature(value)
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # of functions that are defaults


def describe(value: Any) -> str:
    """A function's parameters, a class's parameters and public methods with theirs, or the type of anything else."""
    if inspect.isclass(value):
        methods = {
            name: parameters(member)
            for name, member in vars(value).items()
            if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__")
        }
        try:
            made = parameters(value)
        except (TypeError, ValueError):  # such as a Protocol
            made = ""
        fields = getattr(value, "_fields", ())
        return " ".join([f"class{made}", *fields, *(f".{name}{text}" for name, text in sorted(methods.items()))])
    return parameters(value) if callable(value) else type(value).__name__


def public_api() -> dict[str, dict[str, str]]:
    """{package: {public name: description}}."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        found[package] = {name: describe(getattr(module, name)) for name in sorted(module.__all__)}
    return found


if __name__ == "__main__":
    print(json.dumps(public_api(), indent=1))
