"""`tokencredit doctor`: what a machine has of what the package relies on; every check names what it found and the fix.

`packages` looks at what is installed and at the disk, `launchers` at devices and processes, `hosts` at TRL and verl.
"""

from tokencredit.doctor.check import Check

__all__ = ["Check", "diagnose"]


def diagnose(ray_worker: bool = True) -> list[Check]:
    """All checks, in the order a reader wants them; `ray_worker=False` starts no Ray (some ten seconds with verl)."""
    from tokencredit.doctor import hosts, launchers, packages

    return [
        *packages.check_python(),
        *packages.check_required(),
        *hosts.diagnose(ray_worker),
        *launchers.diagnose(),
        *packages.check_cuda(),
        *packages.check_optional(),
        *packages.check_disk(),
    ]
