"""The example method of docs/adding-a-method.md, as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

from mergekit_ace.methods.layerwise import LayerwiseMethod

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def documented_method() -> LayerwiseMethod:
    """The method that the document adds, its modules made from the text."""
    for path, code in re.findall(r"^```python\n# (\S+)\.py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        name = path.replace("/", ".")
        if name not in sys.modules:
            module = ModuleType(name)
            exec(compile(code, f"{PAGE} ({name})", "exec"), module.__dict__)
            sys.modules[name] = module
    method = sys.modules["mergekit_ace.methods.norm_preserving"].NormPreserving()
    assert isinstance(method, LayerwiseMethod)
    return method
