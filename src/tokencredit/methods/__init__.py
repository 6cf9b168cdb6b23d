"""Methods of credit assignment as pure functions, with one table that tests, docs, command line and adapters read."""

from tokencredit.methods.table import ESTIMATORS as ESTIMATORS
from tokencredit.methods.table import PRESETS as PRESETS
from tokencredit.methods.table import TRANSFORMS as TRANSFORMS
from tokencredit.methods.table import estimators as estimators
from tokencredit.methods.table import presets as presets
from tokencredit.methods.table import transforms as transforms
