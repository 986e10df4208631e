"""The type checker of the tests: beartype, with int for float as PEP 484 has it.

pytest runs it on every annotation of the package: --jaxtyping-packages=dimscope,typechecking.checked
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
