"""The command that makes a model narrower."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.commands.options import COMMON, Common, Given, announce, check_given, check_seed, text_sources
from dimscope.errors import InvalidArgument
from dimscope.terminal import Output

if TYPE_CHECKING:
    from dimscope.studies.narrowing import NarrowSettings


@Parameter(name="*")
@dataclass(frozen=True)
class NarrowOptions:
    """Options of narrowing."""

    width: int | None = None
    "The hidden size to cut to."
    basis: Literal["normalised", "raw", "embedding", "coordinates", "random"] = "normalised"
    "Which directions are kept: widest of what the norms see (normalised), of the stream (raw), of the embedding table, ..."
    verify: Annotated[bool, Parameter(negative=())] = False
    "Rotate at full width instead, which must change nothing, and say what it changes. Nothing is written."
    judge: bool = True
    "Judge and time the narrow model beside the dense one."
    text: Given = None
    "Texts to calibrate and judge on, every other window each (builtin:prose)."
    windows: int | None = None
    "Windows of each text (16, or as many as it has)."
    length: int | None = None
    "Tokens of a window; by default the context of the model, 512 at most."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "What to run in; the checkpoint keeps the dtype in which it is stored."
    device: str | None = None
    "auto, cpu, cuda, cuda:1, mps, or map: spread over all devices by accelerate."

    def settings(self, common: Common, seed: int) -> NarrowSettings:
        """What is asked. Raises InvalidArgument for what does not make sense whatever the model."""
        from dimscope.studies.narrowing import NarrowSettings

        check_seed(seed)
        check_given("--text", self.text, "texts")
        if self.width is None and not self.verify:
            raise InvalidArgument(
                "give the width to cut to: --width K, or --verify to see whether a rotation changes nothing"
            )
        if self.windows is not None and self.windows < 2:
            raise InvalidArgument(f"--windows is at least 2, one to calibrate and one to judge on, not {self.windows}")
        return NarrowSettings(
            width=self.width or 0, basis=self.basis, texts=text_sources(self.text) or ("builtin:prose",),
            windows=self.windows, length=self.length, judged=self.judge, seed=seed, dtype=self.dtype or "auto",
            device=self.device or "auto", trust_remote_code=common.trust_remote_code,
        )  # fmt: skip


NARROW = NarrowOptions()


def narrow(
    model: str = BUILTIN,
    /,
    *,
    seed: int = 0,
    options: NarrowOptions = NARROW,
    common: Common = COMMON,
) -> None:
    """Cuts the hidden size of a model into a standard checkpoint that stock transformers loads, and says what it costs.

    Families: llama, qwen2, qwen3, mistral, gemma. The folder given by --out gets weights, config, tokenizer and a model card with
    the measured account; it is there whole or not at all. Nothing is trained.

    Example: `dimscope narrow builtin --width 192 -o narrow`

    Parameters
    ----------
    seed
        Seed of random directions.
    """
    from dimscope.narrowing.card import not_smaller
    from dimscope.studies.narrowing import narrow as cut
    from dimscope.studies.narrowing import verify_rotation

    settings = options.settings(common, seed)
    if options.verify:
        found = verify_rotation(common.open(model), settings)
        verdict = "exact to rounding" if found.holds else "NOT exact: this model must not be narrowed"
        common.print(
            Output(
                {
                    "model": model, "rotation_at_full_width": verdict, "largest_difference_of_a_logit": found.difference,
                    "largest_logit": found.largest, "same_first_choice": found.same_first, "positions": found.n_positions,
                }
            )
        )  # fmt: skip
        if not found.holds:
            raise InvalidArgument(
                f"{model}: rotated at full width a logit changes by {found.difference:.3g} of {found.largest:.3g}"
            )
        return
    if common.out is None:
        raise InvalidArgument("give the folder of the narrower checkpoint: -o DIR")
    asked = {
        "width": options.width,
        "basis": options.basis,
        "windows": options.windows,
        "length": options.length,
        "seed": seed,
    }
    words = [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]
    texts = ["--text", *settings.texts] if options.text else []
    command = shlex.join(["dimscope", "narrow", model, *words, *texts])
    facts, measured = cut(common.open(model), common.out, settings, command, announce)
    account = facts["account"]
    told = {
        "model": facts["model"],
        "checkpoint": common.out,
        "width": f"{facts['width']} of {facts['dim']}",
        "seconds": facts["seconds"],
    }
    told |= {"parameters_before": account["dense_parameters"], "parameters_after": account["narrow_parameters"]}
    told |= {"bytes_before": account["dense_bytes"], "bytes_after": account["narrow_bytes"]}
    if not_smaller(account):
        told["warning"] = "not smaller than the dense model: untying its tables costs more than the cut saves"
    common.print(Output(told, {"measured": measured} if measured.height else {}))
