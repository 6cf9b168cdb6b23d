"""verl: credit inside verl's trainers on a Ray cluster.

verl loads this package through the entry-point group `verl.plugins`, in the driver and in every worker; `plugin`
registers our trainers there. Where verl is not installed, importing the package only gives access to its functions.
"""

from importlib.util import find_spec

if find_spec("verl") is not None:
    from tokencredit.adapters.verl import plugin as plugin
