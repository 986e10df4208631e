"""The type checker of the tests: beartype, with int for float as PEP 484 has it.

`make test COVERAGE=1` has pytest run it on every annotation of the packages that compute.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
