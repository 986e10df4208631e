"""How many dimensions does a language model really use, and what happens when the rest are taken away?

    import dimscope

    print(dimscope.dimensions("builtin"))                        # or a loaded model, or any N x d array
    result = dimscope.layers(model, tokenizer, text="...")       # every layer; a StudyResult
    small = dimscope.narrow(model, tokenizer, width=192).model   # an ordinary transformers model

Names are loaded when they are first used, so that `import dimscope` alone costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

_MODULES = {
    # verbs
    "dimscope.api": (
        "damage",
        "dimensions",
        "evaluate",
        "narrow",
        "neighbors",
        "perturbation",
        "perturbed",
        "spectrum",
    ),
    # checkpoints
    "dimscope.checkpoints.checkpoint": ("Checkpoint",),
    "dimscope.checkpoints.loaded": ("as_checkpoint", "checkpoint_of"),
    "dimscope.checkpoints.budget": ("embedding_share", "parameter_budget"),
    "dimscope.checkpoints.vocabulary": ("read_vocabulary", "require_tokenizer"),
    "dimscope.checkpoints.model": ("load_model",),
    # texts and vectors
    "dimscope.texts.texts": ("open_text", "text_from_string"),
    "dimscope.texts.windows": ("middle_windows", "shuffle_within", "stream_windows"),
    "dimscope.vectors.embedding": ("open_table",),
    "dimscope.vectors.sources": ("open_vectors",),
    "dimscope.vectors.table": ("VectorTable",),
    "dimscope.vectors.moments": ("Moments", "moments"),
    # a running model
    "dimscope.activations.sites": ("find_sites",),
    "dimscope.activations.passes": ("PassSettings", "run_pass"),
    # numbers
    "dimscope.geometry.spectrum": ("Spectrum", "moments_of", "principal_components"),
    "dimscope.geometry.dimension": ("linear_dimensions",),
    "dimscope.geometry.dimension_table": ("Dimensions", "dimensions_of"),
    "dimscope.geometry.intrinsic": ("intrinsic_dimensions",),
    "dimscope.geometry.nulls": ("white_noise_spectrum",),
    # changes of a table, and generation
    "dimscope.interventions.maps": ("exact_error",),
    "dimscope.evaluation.prompts": ("prepare_prompt",),
    "dimscope.evaluation.generation": ("Decoding", "generate"),
    # studies
    "dimscope.studies.study": ("Monitor", "Study", "StudyResult"),
    "dimscope.studies.embedding.settings": ("EmbeddingSettings",),
    "dimscope.studies.layers.settings": ("LayersSettings",),
    "dimscope.studies.damage.settings": ("DamageSettings",),
    "dimscope.studies.narrowing.settings": ("NarrowSettings",),
    "dimscope.errors": ("DimscopeError", "InvalidArgument"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_STUDIES = ("embedding", "layers")  # whose verb only runs the study
__all__ = sorted([*_HOMES, *_STUDIES, "open"])


def __getattr__(name: str) -> Any:
    """Import a public name, or make the verb of a study, when it is first used."""
    if name == "open":
        return import_module("dimscope.checkpoints.checkpoint").open_checkpoint
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_"):
        for study in import_module("dimscope.studies").STUDIES:
            if study.name == name:
                return import_module("dimscope.api").study_verb(study)
    raise AttributeError(f"module 'dimscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return [*globals(), *__all__]
