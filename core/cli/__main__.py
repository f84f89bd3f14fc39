"""``python -m forget_concept.core.cli``: the same as ``forget-concept``."""

import sys

from . import main

sys.exit(main())
