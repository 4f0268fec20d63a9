"""The startup hook: registers our methods as soon as mergekit's registry has been imported.

mergekit 0.1.5 looks for no plugins, and its users run `mergekit-yaml` unmodified. So the distribution installs
`mergekit_ace_autoload.pth`, whose single line calls `arm()` at every start of Python. That costs two small imports; the
work is done only in a process that imports mergekit. Nothing here may import torch or mergekit, nor break an
interpreter.

mergekit's first import belongs in one thread. Where several threads import it, or register our methods, at once, Python
may refuse one of the imports with a deadlock error: each holds an import lock that another needs. If it is the hook's,
the warning below is all that is seen, and the methods are unknown until a program calls `mergekit_ace.register()`.
Import mergekit before such threads start.
"""

import os
import sys

# Spelled out because importing `typing` would cost more than the rest of this module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY = "mergekit.merge_methods.registry"
SWITCH = "MERGEKIT_ACE_AUTOLOAD"


def arm() -> None:
    """Register our methods once mergekit's registry is there; at once if it already is.

    Does nothing if the environment variable `MERGEKIT_ACE_AUTOLOAD` is `0`, or if the hook is armed already.
    """
    if os.environ.get(SWITCH) == "0":
        return
    if REGISTRY in sys.modules:
        _register()
    # By name: after a reload of this module the armed finder is of the class that was here before.
    elif not any(type(finder).__name__ == _RegistryFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder:
    """Finds mergekit's registry where everyone else does, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the registry's own spec with a loader that registers our methods; None for any other module."""
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _RegisteringLoader:
    """Executes the registry as its own loader does, leaves no trace on it, and registers our methods."""

    def __init__(self, loader: "Loader", finder: _RegistryFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # Only now: had the import failed, the next attempt would need the finder again.
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()


def _register() -> None:
    try:
        from mergekit_ace import register

        register()
    except Exception as error:  # whatever is wrong with us must not stop mergekit
        _warn(f"mergekit-ace could not register its merge methods: {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # `python -W error` asks for exceptions, but this one would stop mergekit
        print(f"RuntimeWarning: {message}", file=sys.stderr)
