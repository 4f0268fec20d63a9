"""A receipt of a file that nobody made."""

from mergekit_ace.engine.receipt import Maker, Receipt


def blank_receipt(file: str) -> Receipt:
    """Of a file without tensors, not sealed."""
    return Receipt(
        key="",
        file=file,
        tensors=(),
        absent=(),
        sha256="",
        changed=0,
        inputs={},
        seconds=0.0,
        reading=0.0,
        writing=0.0,
        warnings=(),
        maker=Maker(host="", processor=""),
    )
