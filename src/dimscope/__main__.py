"""`python -m dimscope` is the command line."""

import sys

from dimscope.cli import main

sys.exit(main())
