"""ACE-Merging for mergekit: data-free model merging with adaptive covariance estimation.

After installation `merge_method: ace` works in every mergekit recipe. Where the startup hook does not run (`python -S`,
zipapps, `MERGEKIT_ACE_AUTOLOAD=0`), call `register()` once before the merge.

Importing this package imports neither torch nor mergekit.
"""

__version__ = "0.2.0"

# Public name -> the module that holds it, imported when the name is first asked for.
_PUBLIC = {
    "METHODS": "mergekit_ace.methods",
    "inspect": "mergekit_ace.api",
    "merge": "mergekit_ace.api",
    "merge_adapters": "mergekit_ace.adapters.api",
}

__all__ = ["METHODS", "__version__", "inspect", "merge", "merge_adapters", "register"]


def register() -> None:
    """Make the methods of this package known to mergekit; may be called any number of times.

    Raises:
        ValueError: mergekit already has a method of the same name that is not ours. Nothing is registered then.
    """
    from mergekit_ace.registration import register_methods

    register_methods()


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    # First, and with no lock of ours held: another thread may be importing it, and its startup hook imports ours.
    import mergekit.merge_methods  # noqa: F401

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _PUBLIC.keys())
