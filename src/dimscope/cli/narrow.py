"""The command that makes a model narrower, plans that, or checks that a rotation changes nothing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.cli.options import COMMON, Common, announce, log_stage
from dimscope.cli.studies import prepared, run_command
from dimscope.cli.terminal import Output
from dimscope.errors import InvalidArgument
from dimscope.studies.narrowing.settings import NarrowSettings

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.study import Study

DEFAULT = NarrowSettings()


def narrow_command(study: Study) -> Callable[..., None]:
    """Return the command that narrows; with --plan it runs the study."""

    def narrow(
        model: str = BUILTIN,
        /,
        *,
        plan: Annotated[bool, Parameter(negative=())] = False,
        verify: Annotated[bool, Parameter(negative=())] = False,
        settings: Annotated[NarrowSettings, Parameter(name="*")] = DEFAULT,
        common: Common = COMMON,
    ) -> None:
        """Cut the hidden size of a model into a standard checkpoint that stock transformers loads, and report what it costs.

        Families: llama, qwen2, qwen3, mistral, gemma, phi, gpt_neox (written as Phi). The folder given by --out gets weights,
        config, tokenizer and a model card with the measured account; it is there whole or not at all. With --plan nothing is
        cut: --out gets a page and the tables behind it. The same command resumes an interrupted one.

        Example: `dimscope narrow builtin --width 192 --basis learned --heal-steps 100 -o narrow`

        Parameters
        ----------
        plan
            Report what each width and basis would cost, compared with dropping layers and rounding weights. Writes no checkpoint.
        verify
            Check the method: rotate at full width, where the output must not change, and report the largest difference.
        """
        _check(settings, common, plan=plan, verify=verify)
        if plan:
            run_command(study, model, settings, common)
        elif verify:
            common.print(_verified(common.open(model), model, prepared(settings, common)))
        else:
            _cut(common.open(model), prepared(settings, common), common)

    return narrow


def _check(settings: NarrowSettings, common: Common, *, plan: bool, verify: bool) -> None:
    """Raise InvalidArgument for options that do not go together."""
    if plan and verify:
        raise InvalidArgument("--plan and --verify are two questions: give one of them")
    if verify and settings.widths:
        raise InvalidArgument("--verify rotates at full width, and takes no --width")
    if settings.prompts and not plan:
        raise InvalidArgument("--prompt goes with --plan, which shows texts side by side")
    if plan or verify:
        return
    if not settings.widths:
        raise InvalidArgument(
            "give the width to cut to: --width K, --plan to see what widths cost, or --verify to see whether a rotation "
            "changes nothing"
        )
    if len(settings.widths) > 1 or len(settings.bases) > 1:
        raise InvalidArgument("one checkpoint has one --width and one --basis; --plan compares several")
    if common.out is None:
        raise InvalidArgument("give the folder of the narrower checkpoint: -o DIR")


def _verified(checkpoint: Checkpoint, model: str, settings: NarrowSettings) -> Output:
    from dimscope.studies.narrowing.verification import verify_rotation

    found = verify_rotation(checkpoint, settings)
    if not found.holds:
        raise InvalidArgument(
            f"{model}: rotated at full width a logit changes by {found.difference:.3g} of {found.largest:.3g}: it must not be narrowed"
        )
    return Output(
        {
            "model": model, "rotation_at_full_width": "exact to rounding", "largest_difference_of_a_logit": found.difference,
            "largest_logit": found.largest, "same_first_choice": found.same_first, "positions": found.n_positions,
        }
    )  # fmt: skip


def _cut(checkpoint: Checkpoint, settings: NarrowSettings, common: Common) -> None:
    from dimscope.narrowing.card import not_smaller
    from dimscope.studies.narrowing.run import narrow_to_folder
    from dimscope.studies.study import Monitor

    assert common.out is not None, "_check refuses a cut without a folder"
    command = shlex.join(["dimscope", *sys.argv[1:]])
    result = narrow_to_folder(checkpoint, common.out, settings, command, Monitor(announce, log_stage))
    facts, account = result.facts, result.account
    rows = {
        "model": facts["model"], "checkpoint": common.out, "width": f"{facts['width']} of {facts['dim']}",
        "seconds": facts["seconds"], "tables": "one, tied" if facts["tied"] else "two",
        "parameters_before": account.dense_parameters, "parameters_after": account.narrow_parameters,
        "bytes_before": account.dense_bytes, "bytes_after": account.narrow_bytes,
    }  # fmt: skip
    rows |= {"tie_costs_kl": facts["tie_cost"]} if "tie_cost" in facts else {}
    if settings.heal_steps:
        rows["healed"] = "better on held-out text" if facts["healed"] else "no better on held-out text, so left as cut"
    if not_smaller(account):
        rows["warning"] = "not smaller than the dense model: untying its tables costs more than the cut saves"
    common.print(Output(rows, result.tables))
