"""Registering this package's methods with mergekit, once."""

from __future__ import annotations

import threading

_LOCK = threading.Lock()


def register_methods() -> None:
    """Register every method of `mergekit_ace.methods.METHODS` that mergekit does not have yet.

    Raises:
        ValueError: mergekit already has a method of the same name that is not ours. Nothing is registered then.
    """
    # Imported before the lock is taken: a thread that held it while waiting for an import could wait for ever on
    # another thread whose import ends in the startup hook, and so here.
    import mergekit.merge_methods.registry as registry

    from mergekit_ace.methods.catalogue import METHODS

    with _LOCK:
        known = {method.spec.name: method for method in registry.registered_methods()}
        for method in METHODS:
            present = known.get(method.spec.name, method)
            if present is not method:
                raise ValueError(
                    f"merge method name must be free or ours; got {method.spec.name!r}, which mergekit knows as "
                    f"{present.spec.pretty_name or type(present).__name__}. Uninstall the other plugin, or set "
                    "MERGEKIT_ACE_AUTOLOAD=0 to use it instead of mergekit-ace."
                )
        for method in METHODS:
            if method.spec.name not in known:
                registry.register(method)
