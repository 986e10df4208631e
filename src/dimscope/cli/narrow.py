"""The command that narrows a model, plans it, or checks the method."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

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

        Families: llama, qwen2, qwen3, mistral, gemma, phi, gpt_neox (written as phi). The folder OUT gets weights, config,
        tokenizer and a model card with measured sizes, losses and speeds; it appears only when it is complete. With --plan no
        model is cut, and OUT gets a page and its tables. An interrupted run resumes when the same command is run again.

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
        raise InvalidArgument("--plan and --verify do not go together: pass one of them")
    if verify and settings.widths:
        raise InvalidArgument("--verify rotates at full width: pass no --width")
    if settings.prompts and not plan:
        raise InvalidArgument("--prompt needs --plan, which shows the continuations side by side")
    if plan or verify:
        return
    if not settings.widths:
        raise InvalidArgument(
            "pass the width to cut to (--width K), --plan to see what widths cost, or --verify to check the method"
        )
    if len(settings.widths) > 1 or len(settings.bases) > 1:
        raise InvalidArgument("a checkpoint has one --width and one --basis; --plan compares several")
    if common.out is None:
        raise InvalidArgument("pass the folder of the narrow checkpoint: -o DIR")


def _verified(checkpoint: Checkpoint, model: str, settings: NarrowSettings) -> Output:
    from dimscope.studies.narrowing.verification import verify_rotation

    result = verify_rotation(checkpoint, settings)
    if not result.holds:
        raise InvalidArgument(
            f"{model}: rotated at full width, a logit changes by {result.difference:.3g}, and the largest logit is "
            f"{result.largest:.3g}; this model must not be narrowed"
        )
    facts = {
        "model": model, "rotation_at_full_width": "exact to rounding", "largest_difference_of_a_logit": result.difference,
        "largest_logit": result.largest, "same_first_choice": result.same_first, "positions": result.n_positions,
    }  # fmt: skip
    answer = (
        f"Rotated at full width, no logit changes by more than {result.difference:.2g} (largest: {result.largest:.3g})."
    )
    return Output(facts, answer=answer)


def _cut(checkpoint: Checkpoint, settings: NarrowSettings, common: Common) -> None:
    from dimscope.narrowing.card import not_smaller
    from dimscope.studies.narrowing.run import narrow_to_folder
    from dimscope.studies.study import Monitor

    assert common.out is not None, "_check refuses a cut without a folder"
    command = shlex.join(["dimscope", *sys.argv[1:]])
    result = narrow_to_folder(checkpoint, common.out, settings, command, Monitor(announce, log_stage))
    facts, account = result.facts, result.account
    rows: dict[str, Any] = {
        "model": facts.model, "checkpoint": common.out, "width": f"{facts.width} of {facts.dim}",
        "tables": "one, tied" if facts.tied else "two",
        "parameters_before": account.dense_parameters, "parameters_after": account.narrow_parameters,
        "bytes_before": account.dense_bytes, "bytes_after": account.narrow_bytes,
    }  # fmt: skip
    if facts.tie_cost is not None:
        rows["tie_costs_kl"] = facts.tie_cost
    if settings.heal_steps:
        rows["healed"] = "better on held-out text" if facts.healed else "no better on held-out text: weights as cut"
    if not_smaller(account):
        rows["warning"] = "not smaller than the dense model: two tables weigh more than the cut saves"
    share = account.narrow_parameters / account.dense_parameters - 1
    change = f"{abs(share):.0%} {'fewer' if share < 0 else 'more'}"
    answer = f"{account.narrow_parameters:,} parameters, {change} than the dense model's {account.dense_parameters:,}."
    common.print(Output(rows | {"seconds": facts.seconds}, result.tables, answer=answer))
