"""`python -m pm_llm` is `pm-llm`."""

import sys

from pm_llm.cli import main

sys.exit(main())
