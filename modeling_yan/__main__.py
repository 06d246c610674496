"""`python -m modeling_yan`: the command `yan`."""

import sys

from .commands import main

sys.exit(main())
