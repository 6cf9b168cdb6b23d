"""Versions of the hosts that the adapters were written for: they override private methods, which move."""

from importlib.metadata import version

from tokencredit.errors import TokenCreditError

# From, and before.
SUPPORTED = {"trl": ((1, 5), (2, 0)), "verl": ((0, 9), (0, 10))}
NAMES = {"trl": "TRL", "verl": "verl"}


def is_supported(host: str, installed: str) -> bool:
    """Whether the adapter was written for this version."""
    numbers = tuple(int(part) for part in installed.split(".")[:2])
    first, stop = SUPPORTED[host]
    return first <= numbers < stop


def supported_range(host: str) -> str:
    """The versions as pip writes them: `>=1.5,<2`."""
    first, stop = (".".join(map(str, numbers)).removesuffix(".0") for numbers in SUPPORTED[host])
    return f">={first},<{stop}"


def check_versions(host: str, installed: str | None = None) -> None:
    """Refuse a host whose private seams the adapter was not written for."""
    installed = installed or version(host)
    if not is_supported(host, installed):
        raise TokenCreditError(
            f"{NAMES[host]} {installed} is outside the supported range {supported_range(host)}",
            hint=f"pip install '{host}{supported_range(host)}'",
        )
