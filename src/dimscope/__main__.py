"""`python -m dimscope` is the command line."""

import sys

from dimscope.cli.app import main

sys.exit(main())
