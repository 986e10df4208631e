"""How many dimensions does a language model really use, and what happens when the rest are taken away?

    import dimscope

    checkpoint = dimscope.open("builtin")                      # or a folder, or a hub id
    table = dimscope.open_table(checkpoint)
    moments = dimscope.moments_of(table)                       # one pass, float64, d x d
    for d in dimscope.linear_dimensions(dimscope.spectrum(moments, centred=True)):
        print(d.metric, d.value)

Names are loaded when they are first used, so that `import dimscope` alone costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

_HOMES = {
    "open": ("dimscope.checkpoints.checkpoint", "open_checkpoint"),
    "Checkpoint": ("dimscope.checkpoints.checkpoint", "Checkpoint"),
    "parameter_budget": ("dimscope.checkpoints.budget", "parameter_budget"),
    "embedding_share": ("dimscope.checkpoints.budget", "embedding_share"),
    "read_vocabulary": ("dimscope.checkpoints.vocabulary", "read_vocabulary"),
    "VectorTable": ("dimscope.vectors.table", "VectorTable"),
    "open_table": ("dimscope.vectors.embedding", "open_table"),
    "table_from_tensor": ("dimscope.vectors.table", "table_from_tensor"),
    "Moments": ("dimscope.vectors.moments", "Moments"),
    "moments": ("dimscope.vectors.moments", "moments"),
    "moments_of": ("dimscope.geometry.spectrum", "moments_of"),
    "Spectrum": ("dimscope.geometry.spectrum", "Spectrum"),
    "spectrum": ("dimscope.geometry.spectrum", "spectrum"),
    "principal_components": ("dimscope.geometry.spectrum", "principal_components"),
    "linear_dimensions": ("dimscope.geometry.dimension", "linear_dimensions"),
    "load_model": ("dimscope.checkpoints.model", "load_model"),
    "require_tokenizer": ("dimscope.checkpoints.vocabulary", "require_tokenizer"),
    "open_text": ("dimscope.texts.texts", "open_text"),
    "middle_windows": ("dimscope.texts.windows", "middle_windows"),
    "stream_windows": ("dimscope.texts.windows", "stream_windows"),
    "shuffle_within": ("dimscope.texts.windows", "shuffle_within"),
    "find_sites": ("dimscope.activations.sites", "find_sites"),
    "PassSettings": ("dimscope.activations.passes", "PassSettings"),
    "run_pass": ("dimscope.activations.passes", "run_pass"),
    "raw_spectra": ("dimscope.studies.layers.tables", "raw_spectra"),
    "intrinsic_dimensions": ("dimscope.geometry.intrinsic", "intrinsic_dimensions"),
    "white_noise_spectrum": ("dimscope.geometry.nulls", "white_noise_spectrum"),
    "LayersSettings": ("dimscope.studies.layers.settings", "LayersSettings"),
    "TableSummary": ("dimscope.interventions.table_summary", "TableSummary"),
    "make_map": ("dimscope.interventions.perturbations", "make_map"),
    "make_chain": ("dimscope.interventions.table_summary", "make_chain"),
    "exact_error": ("dimscope.interventions.maps", "exact_error"),
    "perturbed": ("dimscope.interventions.insertion", "perturbed"),
    "baseline": ("dimscope.evaluation.evaluate", "baseline"),
    "evaluate": ("dimscope.evaluation.evaluate", "evaluate"),
    "Decoding": ("dimscope.evaluation.generation", "Decoding"),
    "prepare_prompt": ("dimscope.evaluation.prompts", "prepare_prompt"),
    "generate": ("dimscope.evaluation.generation", "generate"),
    "DamageSettings": ("dimscope.studies.damage.settings", "DamageSettings"),
    "NarrowSettings": ("dimscope.studies.narrowing.session", "NarrowSettings"),
    "verify_rotation": ("dimscope.studies.narrowing.run", "verify_rotation"),
    "narrow": ("dimscope.studies.narrowing.run", "narrow"),
    "neighbor_tables": ("dimscope.studies.embedding.neighbors", "neighbor_tables"),
    "EmbeddingSettings": ("dimscope.studies.embedding.run", "EmbeddingSettings"),
    "DimscopeError": ("dimscope.errors", "DimscopeError"),
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dimscope' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
