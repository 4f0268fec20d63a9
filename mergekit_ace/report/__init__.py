"""What a merge will do, before it is done: measure, summarize, write. Records in, records out.

One direction: model, naming, wording, sampling -> interference, spectrum -> measure -> inspection -> summary, advice ->
plots -> as_json, as_csv, as_html, as_png, terminal. The public names below are imported when first asked for, so that
measuring does not import matplotlib.
"""

from __future__ import annotations

import importlib

# Public name -> the module that holds it.
_PUBLIC = {
    "Report": "model",
    "TensorReport": "model",
    "ExpertReport": "model",
    "inspect_recipe": "inspection",
    "inspect_tensors": "inspection",
    "summarize": "summary",
    "advise": "advice",
    "figures": "plots",
    "spectra": "plots",
    "read_json": "as_json",
    "write_json": "as_json",
    "write_csv": "as_csv",
    "write_html": "as_html",
    "write_png": "as_png",
    "print_summary": "terminal",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _PUBLIC.keys())
