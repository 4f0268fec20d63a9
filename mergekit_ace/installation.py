"""What matters to a merge on this machine: versions, the startup hook, devices, the precision of float32 products."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from rich.filesize import decimal

from mergekit_ace import __version__
from mergekit_ace.autoload import SWITCH

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warning", "error"]
# Not required by this package itself, but part of what mergekit does with adapters and tokenizers.
_ALSO_SHOWN = ("peft", "tokenizers", "numpy")
_PRECISION_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
_HOOK_IS_ARMED = "import sys; print(any(type(finder).__name__ == '_RegistryFinder' for finder in sys.meta_path))"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that was looked at.

    Attributes:
        topic: `versions`, `startup hook`, `devices` or `precision`.
        name: of the thing.
        value: what was found.
        level: whether merges work with it.
        remedy: what to do about it, where something is to be done.
    """

    topic: str
    name: str
    value: str
    level: Level = "ok"
    remedy: str = ""


def examine() -> Iterator[Fact]:
    """Look at everything; imports torch and mergekit, which takes seconds."""
    yield from _versions()
    yield from _startup_hook()
    yield from _devices()
    yield from _precision()


def _versions() -> Iterator[Fact]:
    yield Fact(topic="versions", name="Python", value=f"{platform.python_version()}, {sys.executable}")
    yield Fact(topic="versions", name="platform", value=platform.platform())
    yield Fact(topic="versions", name="mergekit-ace", value=__version__)
    for text in metadata.requires("mergekit-ace") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement)
    for name in _ALSO_SHOWN:
        yield _version(Requirement(name))


def _version(requirement: Requirement) -> Fact:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        found = None
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return Fact(topic="versions", name=requirement.name, value=found)
    needed = f"{requirement.name} {requirement.specifier}".strip()
    return Fact(
        topic="versions",
        name=requirement.name,
        value=found or "not installed",
        level="error",
        remedy=f"{needed} is needed: {sys.executable} -m pip install '{requirement}'",
    )


def _startup_hook() -> Iterator[Fact]:
    if os.environ.get(SWITCH) == "0":
        yield Fact(
            topic="startup hook",
            name="in a new process",
            value=f"switched off by {SWITCH}=0",
            level="error",
            remedy=f"Unset {SWITCH}; until then mergekit-yaml knows none of these methods (`mergekit-ace merge` does).",
        )
    else:
        # A new process, as mergekit-yaml will be one: in this one the hook may have run and be gone.
        run = subprocess.run([sys.executable, "-c", _HOOK_IS_ARMED], capture_output=True, text=True, check=False)
        armed = run.stdout.strip() == "True"
        yield Fact(
            topic="startup hook",
            name="in a new process",
            value="armed" if armed else "not armed",
            level="ok" if armed else "error",
            remedy="" if armed else f"Install the package again: {sys.executable} -m pip install --force-reinstall "
            "--no-deps mergekit-ace. From Python, mergekit_ace.register() does the same.",
        )  # fmt: skip
    yield _registration()
    yield _mergekit_yaml()


def _registration() -> Fact:
    try:
        from mergekit_ace import register

        register()
        from mergekit.merge_methods.registry import registered_methods

        from mergekit_ace.methods import METHODS

        known = {method.spec.name for method in registered_methods()}
        missing = [method.name for method in METHODS if method.name not in known]
    except Exception as error:  # whatever keeps mergekit from being imported is what is to be shown
        return Fact(
            topic="startup hook",
            name="methods",
            value=f"cannot be registered: {type(error).__name__}: {error}",
            level="error",
            remedy="Compare the versions above with those that mergekit 0.1.5 allows.",
        )
    names = ", ".join(method.name for method in METHODS)
    return Fact(topic="startup hook", name="methods", value=names, level="error" if missing else "ok")


def _mergekit_yaml() -> Fact:
    found = shutil.which("mergekit-yaml")
    if found is None:
        remedy = f"Activate the environment, or call {Path(sys.executable).with_name('mergekit-yaml')}."
        return Fact(topic="startup hook", name="mergekit-yaml", value="not on the path", level="warning", remedy=remedy)
    if Path(found).resolve().parent != Path(sys.executable).parent.resolve():
        return Fact(
            topic="startup hook",
            name="mergekit-yaml",
            value=f"{found}, of another environment than {sys.executable}",
            level="warning",
            remedy="Install mergekit-ace into the environment whose mergekit-yaml you call.",
        )
    return Fact(topic="startup hook", name="mergekit-yaml", value=found)


def _devices() -> Iterator[Fact]:
    import torch

    cores = os.cpu_count() or 1
    yield Fact(topic="devices", name="cpu", value=f"{torch.get_num_threads()} threads, {cores} cores{_memory()}")
    build = torch.version.cuda or getattr(torch.version, "hip", None)
    if not torch.cuda.is_available():
        why = "no GPU is usable" if build else "this torch is built for the CPU"
        yield Fact(topic="devices", name="cuda", value=f"none: {why}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Fact(
            topic="devices",
            name=f"cuda:{index}",
            value=f"{name}, {decimal(free)} of {decimal(total)} free, torch built for {build}",
        )
    if torch.backends.mps.is_available():
        yield Fact(
            topic="devices",
            name="mps",
            value="not used",
            remedy="float64, which the refinement works in, does not exist there: merge on the CPU.",
        )


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return ""
    return f", {decimal(free)} of {decimal(total)} free"


def _precision() -> Iterator[Fact]:
    import torch

    from mergekit_ace.linalg.precision import require_full_float32

    for variable in _PRECISION_VARIABLES:
        if variable in os.environ:
            switched_on = os.environ[variable] not in ("", "0")
            yield Fact(
                topic="precision",
                name=variable,
                value=os.environ[variable],
                level="error" if switched_on else "ok",
                remedy=f"Unset {variable}: it lets float32 products run as TF32." if switched_on else "",
            )
    yield _full_precision(require_full_float32, "float32 products", torch.device("cpu"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield _full_precision(require_full_float32, f"float32 products, cuda:{index}", torch.device("cuda", index))


def _full_precision(guard: Callable[[torch.device], None], name: str, device: torch.device) -> Fact:
    try:
        guard(device)
    except RuntimeError as error:
        return Fact(topic="precision", name=name, value="reduced", level="error", remedy=str(error))
    return Fact(topic="precision", name=name, value="full")
