"""The command that makes a model narrower, says beforehand what that would cost, or that a rotation costs nothing."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.commands.options import COMMON, Common, Given, announce, check_given, check_seed, text_sources
from dimscope.errors import InvalidArgument
from dimscope.terminal import Output

if TYPE_CHECKING:
    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.narrowing_bench import NarrowSettings

Bases = Literal["normalised", "learned", "raw", "embedding", "coordinates", "random"]


@Parameter(name="*")
@dataclass(frozen=True)
class NarrowOptions:
    """Options of narrowing."""

    width: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True, negative=())] = None
    "The hidden size to cut to; several for a plan."
    basis: Annotated[tuple[Bases, ...] | None, Parameter(consume_multiple=True, negative=())] = None
    "Directions kept: widest of what the norms see (normalised, default), learned, widest of the stream (raw) or of the table, ..."
    plan: Annotated[bool, Parameter(negative=())] = False
    "Say what each width and basis would cost, beside dropping layers and rounding weights. No checkpoint is written."
    verify: Annotated[bool, Parameter(negative=())] = False
    "Rotate at full width instead, which must change nothing, and say what it changes. Nothing is written."
    learn: int | None = None
    "Steps of a learned basis (150)."
    heal: int | None = None
    "Steps of training towards the dense model after the cut, norms first; kept only where it is better on held-out text (0)."
    lora: int | None = None
    "Heal by low-rank changes of this rank, with peft."
    tied: Annotated[bool | None, Parameter(negative="--untied")] = None
    "Keep one table for reading and predicting (as the model has it), or give a tied model two, which is exact."
    as_: Annotated[Literal["llama", "phi"] | None, Parameter(name="--as")] = None
    "Write a Qwen2 as a Llama with biases, a GPT-NeoX as a Phi (always): the same model in another family."
    judge: bool = True
    "Judge and time the narrow model beside the dense one."
    text: Given = None
    "Texts to calibrate, train and judge on, each on windows of its own (builtin:prose), or generated: the model's own."
    windows: int | None = None
    "Windows to judge on, and as many to calibrate on; training takes the rest of the text (8)."
    length: int | None = None
    "Tokens of a window; by default the context of the model, 512 at most."
    prompt: Given = None
    "Prompts that the dense and the narrow model go on with, in a plan."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "What to run in; the checkpoint keeps the dtype in which it is stored."
    device: str | None = None
    "auto, cpu, cuda, cuda:1 or mps."

    def settings(self, common: Common, seed: int) -> NarrowSettings:
        """What is asked. Raises InvalidArgument for what does not make sense whatever the model."""
        from dimscope.studies.narrowing_bench import NarrowSettings

        check_seed(seed)
        for option, values, what in (
            ("--text", self.text, "texts"), ("--prompt", self.prompt, "prompts"), ("--basis", self.basis, "bases"),
            ("--width", self.width, "widths"),
        ):  # fmt: skip
            check_given(option, values, what)
        for name, least in (("learn", 1), ("heal", 0), ("lora", 1), ("windows", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidArgument(f"--{name} is at least {least}, not {value}")
        if self.plan and self.verify:
            raise InvalidArgument("--plan and --verify are two questions: give one of them")
        if self.verify and self.width:
            raise InvalidArgument("--verify rotates at full width, and takes no --width")
        if not (self.plan or self.verify):
            self._check_one()
        if self.lora and not self.heal:
            raise InvalidArgument("--lora says how to heal: give --heal STEPS too")
        if self.prompt and not self.plan:
            raise InvalidArgument("--prompt goes with --plan, which shows texts side by side")
        given = {
            "basis": self.basis[0] if self.basis else None, "texts": text_sources(self.text), "windows": self.windows,
            "length": self.length, "learn": self.learn, "heal": self.heal, "lora": self.lora, "export": self.as_,
            "tied": self.tied, "prompts": self.prompt, "dtype": self.dtype, "device": self.device,
        }  # fmt: skip
        chosen = {key: value for key, value in given.items() if value is not None}
        return replace(
            NarrowSettings(), **chosen, judged=self.judge, seed=seed, trust_remote_code=common.trust_remote_code
        )

    def _check_one(self) -> None:
        if not self.width:
            raise InvalidArgument(
                "give the width to cut to: --width K, --plan to see what widths cost, or --verify to see whether a rotation "
                "changes nothing"
            )
        if len(self.width) > 1 or len(self.basis or ()) > 1:
            raise InvalidArgument("one checkpoint has one --width and one --basis; --plan compares several")


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

    Families: llama, qwen2, qwen3, mistral, gemma, phi, gpt_neox (written as Phi). The folder given by --out gets weights,
    config, tokenizer and a model card with the measured account; it is there whole or not at all. With --plan nothing is
    cut: --out gets a page and the tables behind it. The same command goes on where an interrupted one stopped.

    Example: `dimscope narrow builtin --width 192 --basis learned --heal 100 -o narrow`

    Parameters
    ----------
    seed
        Seed of random directions and of the order of training.
    """
    settings = options.settings(common, seed)
    if options.verify:
        common.print(_verified(common.open(model), model, settings))
    elif options.plan:
        _plan(common.open(model), options, settings, common)
    elif common.out is None:
        raise InvalidArgument("give the folder of the narrower checkpoint: -o DIR")
    else:
        _cut(common.open(model), options, settings, common)


def _verified(checkpoint: Checkpoint, model: str, settings: NarrowSettings) -> Output:
    from dimscope.studies.narrowing import verify_rotation

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


def _plan(checkpoint: Checkpoint, options: NarrowOptions, settings: NarrowSettings, common: Common) -> None:
    import polars as pl

    from dimscope.report.run import run_narrowing
    from dimscope.studies.narrowing_advice import candidate_name

    with common.folder() as directory:
        facts, tables = run_narrowing(
            checkpoint, directory, settings, widths=options.width or (), bases=options.basis or (), announce=announce
        )
    told = {"model": facts["model"], "seconds": facts["seconds"]}
    told |= {} if common.out is None else {"page": common.out / "index.html"}
    told |= {"advice": ". ".join(line.rstrip(".") for line in facts["study"]["narrowing"]["advice"]) + "."}
    names = [candidate_name(row) for row in tables["plan"].iter_rows(named=True)]
    shown = ("parameters", "loss_rise", "kl", "top_1", "prefill_ratio", "kl_dropping")
    summary = tables["plan"].select(pl.Series("candidate", names), *shown)
    common.print(Output(told, {"candidates": summary}, files_only=tables))


def _cut(checkpoint: Checkpoint, options: NarrowOptions, settings: NarrowSettings, common: Common) -> None:
    from dimscope.narrowing.card import not_smaller
    from dimscope.studies.narrowing import narrow as cut

    assert options.width, "settings() sees to it"
    assert common.out is not None, "narrow() sees to it"
    facts, tables = cut(
        checkpoint, common.out, options.width[0], settings, shlex.join(["dimscope", *sys.argv[1:]]), announce
    )
    account = facts["account"]
    told = {
        "model": facts["model"], "checkpoint": common.out, "width": f"{facts['width']} of {facts['dim']}",
        "seconds": facts["seconds"], "tables": "one, tied" if facts["tied"] else "two",
        "parameters_before": account["dense_parameters"], "parameters_after": account["narrow_parameters"],
        "bytes_before": account["dense_bytes"], "bytes_after": account["narrow_bytes"],
    }  # fmt: skip
    told |= {"tie_costs_kl": facts["tie_cost"]} if "tie_cost" in facts else {}
    if settings.heal:
        told["healed"] = "better on held-out text" if facts["healed"] else "no better on held-out text, so left as cut"
    if not_smaller(account):
        told["warning"] = "not smaller than the dense model: untying its tables costs more than the cut saves"
    common.print(Output(told, tables))
