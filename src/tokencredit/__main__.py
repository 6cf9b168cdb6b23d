"""`python -m tokencredit`: the command line."""

import sys

from tokencredit.cli.main import main

sys.exit(main())
