"""The studies: the one place where a study joins the report, the command line and the library."""

from dimscope.studies.damage.study import DAMAGE
from dimscope.studies.embedding.study import EMBEDDING
from dimscope.studies.layers.study import LAYERS
from dimscope.studies.narrowing.study import NARROWING

STUDIES = (EMBEDDING, LAYERS, DAMAGE, NARROWING)
"""In the order of the page."""
