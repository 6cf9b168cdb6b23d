"""One line of `tokencredit doctor`."""

from typing import Literal

Check = dict[str, str]
Status = Literal["ok", "fail", "note"]


def check(name: str, status: Status, found: str, fix: str = "") -> Check:
    """What was checked, how it stands, what was found, and the fix where there is something to fix."""
    return {"name": name, "status": status, "found": found, "fix": fix}
