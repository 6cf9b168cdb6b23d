"""`tokencredit doctor`: versions, what TRL and verl offer, devices, disk; for each problem the fix."""

import argparse
import json
import sys
from typing import Any

from tokencredit.progress import printable

MARKS = {"ok": "ok  ", "fail": "FAIL", "note": "note"}


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "doctor", help="check the installation: versions, TRL and verl, devices, disk, what to fix"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--no-ray", action="store_true", help="do not start Ray to look into one of its workers")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Handle the verb; 1 when something must be fixed."""
    from tokencredit.doctor import diagnose
    from tokencredit.doctor.packages import has_verl

    ray_worker = has_verl() and not arguments.no_ray
    if ray_worker:
        print("starting Ray to look into one of its workers …", file=sys.stderr, flush=True)
    checks = diagnose(ray_worker)
    broken = [check for check in checks if check["status"] == "fail"]
    if arguments.json:
        print(json.dumps({"checks": checks, "ok": not broken}))
        return 1 if broken else 0
    for check in checks:
        print(f"{MARKS[check['status']]}  {printable(check['name'])}: {printable(check['found'])}")
        if check["fix"]:
            print(f"      fix: {printable(check['fix'])}")
    print(f"{len(broken)} to fix" if broken else "nothing to fix", file=sys.stderr)
    return 1 if broken else 0
