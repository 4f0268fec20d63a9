"""mutmut on this package: `python tests/mutations.py run`, see `make test-mutations`.

The startup hook imports the package from the checkout before mutmut can put its mutated copy first, so it is unloaded
here. Tests of the wrong copy would find nothing, and tests/conftest.py refuses to run them. The folder of this file,
which Python puts first, holds tests of packaging under the name of the library.
"""

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))

for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit_ace"]:
    del sys.modules[name]

from mutmut.__main__ import cli  # noqa: E402

if __name__ == "__main__":
    cli()
