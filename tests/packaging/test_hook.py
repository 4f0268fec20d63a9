"""The startup hook registers the methods once, whoever imports mergekit, and registration stands repetition."""

import json
from pathlib import Path

import pytest

from tests.forks import ForkServer
from tests.packaging.environments import Environment

FINDERS = "import sys; print([type(finder).__name__ for finder in sys.meta_path])"

ENTRANCES = (
    "mergekit.merge",
    "mergekit.merge_methods",
    "mergekit.merge_methods.base",
    "mergekit.merge_methods.registry",
    "mergekit.merge_methods.slerp",
    "mergekit.plan",
    "mergekit.scripts.merge_raw_pytorch",
    "mergekit.scripts.multimerge",
    "mergekit_ace.methods",
    "mergekit_ace.methods.ace",
    "mergekit_ace.methods.catalogue",
)

# Every name that we registered, whether the hook is still armed, and whether it has left a trace on the registry.
STATE = """
import sys, json
from importlib.machinery import SourceFileLoader
from mergekit.merge_methods import registry
from mergekit_ace import METHODS
known = registry.registered_methods()
armed = any(type(finder).__name__ == "_RegistryFinder" for finder in sys.meta_path)
ours = [method.spec.name for method in METHODS]
print(json.dumps({
    "known": [method.spec.name for method in known if method in METHODS] == ours and "ace" in ours,
    "armed": armed,
    "plain": type(registry.__loader__) is type(registry.__spec__.loader) is SourceFileLoader,
}))
"""
REGISTERED = {"known": True, "armed": False, "plain": True}


def state(outcome: tuple[int, str]) -> dict[str, bool]:
    status, output = outcome
    assert status == 0, output
    assert "Warning" not in output
    result: dict[str, bool] = json.loads(output.splitlines()[-1])
    return result


@pytest.mark.parametrize("module", ENTRANCES)
def test_any_entrance_to_mergekit_registers_the_methods(module: str, forks: ForkServer) -> None:
    assert state(forks.run(f"import {module}\n{STATE}")) == REGISTERED


THREADS = """
import os, sys, threading
os.environ["MERGEKIT_ACE_AUTOLOAD"] = "0"
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_RegistryFinder"]
import mergekit.merge_methods, mergekit_ace
sys.setswitchinterval(1e-6)
barrier, failures = threading.Barrier(8), []
def act():
    barrier.wait()
    try:
        mergekit_ace.register()
        mergekit.merge_methods.get("ace")
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=act) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failures, failures
"""


def test_threads_that_register_at_once_register_each_method_once(forks: ForkServer) -> None:
    assert state(forks.run(f"{THREADS}\n{STATE}")) == REGISTERED


def test_the_switch_turns_the_hook_off(installed: Environment) -> None:
    assert "_RegistryFinder" not in installed.run("-c", FINDERS, MERGEKIT_ACE_AUTOLOAD="0").stdout
    assert "_RegistryFinder" in installed.run("-c", FINDERS, MERGEKIT_ACE_AUTOLOAD="1").stdout


def test_the_doctor_finds_a_startup_file_that_is_gone(wheel: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "environment")
    environment.install(wheel)
    (environment.site_packages / "mergekit_ace_autoload.pth").unlink()
    done = environment.run("-m", "mergekit_ace", "doctor")
    assert done.returncode == 1, done.stderr
    assert "error    in a new process  not armed" in done.stdout
    assert "--force-reinstall" in done.stdout


@pytest.mark.parametrize("flags", [(), ("-I",), ("-E", "-s"), ("-O",)], ids=str)
def test_the_hook_is_armed_once_under_any_flags(flags: tuple[str, ...], installed: Environment) -> None:
    done = installed.run(*flags, "-c", FINDERS)
    assert done.stdout.count("_RegistryFinder") == 1
    assert done.stderr == ""


DISARM = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_RegistryFinder']\n"
REGISTER_TWICE = "import mergekit_ace\nmergekit_ace.register()\nmergekit_ace.register()\n"

SITUATIONS = {
    "register, with the hook": REGISTER_TWICE,
    "register, without the hook": DISARM + REGISTER_TWICE,
    "register, after mergekit and without the hook": DISARM + "import mergekit.merge\n" + REGISTER_TWICE,
    "hook armed after mergekit": DISARM + "import mergekit.merge, mergekit_ace.autoload\nmergekit_ace.autoload.arm()\n",
    "reload of the package and the hook": """
import importlib, sys, mergekit_ace, mergekit_ace.autoload
importlib.reload(mergekit_ace)
importlib.reload(mergekit_ace.autoload).arm()
assert [type(finder).__name__ for finder in sys.meta_path].count("_RegistryFinder") == 1
import mergekit.merge
""",
    "reload of the registry": """
import importlib, mergekit_ace, mergekit.merge_methods.registry as registry
importlib.reload(registry)
mergekit_ace.register()
""",
    "somebody only looks for the registry": """
import sys, mergekit
(finder,) = [finder for finder in sys.meta_path if type(finder).__name__ == "_RegistryFinder"]
spec = finder.find_spec("mergekit.merge_methods.registry", [mergekit.__path__[0] + "/merge_methods"])
assert "def register" in spec.loader.get_source(spec.name)
assert finder in sys.meta_path
""",
    "an import that fails the first time": """
import sys
sys.modules["mergekit.merge_methods.karcher"] = None
try: import mergekit.merge_methods.registry
except ImportError: pass
else: raise AssertionError
del sys.modules["mergekit.merge_methods.karcher"]
""",
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_methods_are_registered_whatever_comes_before(situation: str, forks: ForkServer) -> None:
    assert state(forks.run(SITUATIONS[situation] + STATE)) == REGISTERED


@pytest.mark.parametrize("action", ["default", "error"])
def test_a_broken_package_is_a_warning_and_mergekit_works(action: str, forks: ForkServer) -> None:
    broken = "import sys\nsys.modules['mergekit_ace.methods.catalogue'] = None\n"
    filters = f"import warnings\nwarnings.simplefilter({action!r}, RuntimeWarning)\n"
    status, output = forks.run(broken + filters + "from mergekit.merge_methods import get\nget('ties')\n")
    assert status == 0, output
    assert "RuntimeWarning: mergekit-ace could not register its merge methods: ModuleNotFoundError" in output
    assert "Traceback" not in output


def test_from_a_zip_archive_register_does_it(wheel: Path, forks: ForkServer) -> None:
    forget = "for name in [n for n in sys.modules if n.startswith('mergekit_ace')]: del sys.modules[name]\n"
    path = f"sys.path.insert(0, {str(wheel)!r})\n"
    check = "import mergekit_ace\nassert '.whl' in mergekit_ace.__file__\n"
    assert state(forks.run(DISARM + forget + path + check + REGISTER_TWICE + STATE)) == REGISTERED


def test_without_site_register_does_it(installed: Environment) -> None:
    path = installed.run("-c", "import sys; print(sys.path)").stdout
    code = f"import sys\nassert 'mergekit_ace' not in sys.modules\nsys.path[:] = {path}\n"
    done = installed.run("-S", "-c", code + REGISTER_TWICE + STATE)
    assert json.loads(done.stdout) == REGISTERED, done.stderr


def test_a_subinterpreter_starts_with_the_hook(installed: Environment) -> None:
    done = installed.run(
        "-c",
        "try: import _interpreters as interpreters\n"
        "except ImportError: import _xxsubinterpreters as interpreters\n"
        "check = 'import sys; assert \"_RegistryFinder\" in [type(f).__name__ for f in sys.meta_path]'\n"
        "failure = interpreters.run_string(interpreters.create(), check)\n"
        "assert failure is None, failure\n",
    )
    assert done.returncode == 0, done.stderr
