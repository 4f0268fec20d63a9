"""The guard of float32 products, against each way of lowering their precision."""

from collections.abc import Callable, Iterator

import pytest
import torch

from mergekit_ace.linalg.precision import require_full_float32


def lower_cuda() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def lower_mkldnn() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


LOWERED: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
# Older versions of torch have no switch for each backend.
if hasattr(torch.backends.mkldnn, "matmul"):
    LOWERED |= {"cuda": lower_cuda, "mkldnn": lower_mkldnn}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_full_precision_is_accepted() -> None:
    require_full_float32()


@pytest.mark.parametrize("how", LOWERED)
def test_a_lower_precision_is_refused_and_the_remedy_helps(how: str) -> None:
    LOWERED[how]()
    with pytest.raises(RuntimeError, match=r"Call torch.set_float32_matmul_precision\('highest'\)"):
        require_full_float32()
    torch.set_float32_matmul_precision("highest")
    require_full_float32()
