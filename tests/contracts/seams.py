"""One readable line for a seam that has moved: host, version, seam, what was expected, what is there."""

from importlib.metadata import version
from typing import Any


def expect(host: str, seam: str, found: Any, wanted: Any) -> None:
    """Fail with the seam's name where `found` is not `wanted`."""
    assert found == wanted, moved(host, seam, found, wanted)


def moved(host: str, seam: str, found: Any, wanted: Any) -> str:
    """The line itself."""
    return f"{host} {version(host)}, {seam}: expected {wanted!r}, found {found!r}"
