"""The command about hidden layers, and its options, which the report shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from dimscope.checkpoints import BUILTIN
from dimscope.commands.options import COMMON, Common, Given, announce, check_given, check_seed, text_sources
from dimscope.errors import InvalidArgument
from dimscope.terminal import Output

if TYPE_CHECKING:
    from dimscope.studies.layer_plan import LayersSettings


@Parameter(name="*")
@dataclass(frozen=True)
class LayersOptions:
    """Options of the study of hidden layers."""

    text: Given = None
    "Texts: files, folders, FILE.parquet:COLUMN, URLs, - or builtin:prose, builtin:html (both, by default)."
    windows: str | None = None
    "Windows of each text, spread evenly over it (8, or as many as every text has); all streams whole texts."
    length: int | None = None
    "Tokens of a window; by default the context of the model, 1,024 at most."
    shuffles: int | None = None
    "Draws of the text shuffled within each window (5)."
    across: int | None = None
    "Draws of the text shuffled across its windows (1)."
    random_weights: bool | None = None
    "Run the same architecture with random weights beside the model (yes)."
    logits: bool | None = None
    "Measure confidence, loss and bits per byte (yes)."
    curve: Annotated[bool | None, Parameter(negative=())] = None
    "Every dimension over growing numbers of tokens too."
    thresholds: str | None = None
    "Percent of the variance to count components for, such as 80,95 (80,90,95,99)."
    layers: str | None = None
    "Layers to measure, such as 0,4:8,norm: 0 or emb is the input of block 1, norm the final norm (all)."
    layer: int | None = None
    "The layer to show where there is room for one (the middle)."
    reservoir: int | None = None
    "Tokens whose states are kept for what sums cannot tell: neighbours, similarity (2,048)."
    batch: int | None = None
    "Windows at once."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "What to compute in; auto is float32 on a CPU where that fits, else as stored."
    device: str | None = None
    "auto, cpu, cuda, cuda:1, mps, or map: spread over all devices by accelerate."
    preset: Literal["notebook"] | None = None
    "notebook: one window from the middle, one shuffle, 95%, layer 10; other options go on top."
    checkpoint_every: float | None = None
    "Seconds between two checkpoints of a pass (60)."
    shard: str | None = None
    "I/N: only this part of every pass; the last of N processes on one folder puts them together."

    def settings(self, common: Common, seed: int) -> LayersSettings:
        """What the study is asked. Raises InvalidArgument for what does not make sense whatever the model."""
        from dimscope.studies.layer_plan import LayersSettings, notebook_settings

        check_seed(seed)
        check_given("--text", self.text, "texts")
        base = notebook_settings() if self.preset == "notebook" else LayersSettings()
        given = {
            "texts": text_sources(self.text),
            "windows": _windows(self.windows), "length": self.length, "shuffles": self.shuffles,
            "across": self.across, "twin": self.random_weights, "logits": self.logits, "curve": self.curve,
            "thresholds": _thresholds(self.thresholds), "layers": self.layers, "chosen_layer": self.layer,
            "reservoir": self.reservoir, "batch": self.batch, "dtype": self.dtype, "device": self.device,
            "checkpoint_every": self.checkpoint_every, "shard": _shard(self.shard),
        }  # fmt: skip
        for name, least in (("shuffles", 0), ("across", 0), ("reservoir", 64), ("batch", 1), ("layer", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidArgument(f"--{name} is at least {least}, not {value}")
        if self.shard is not None and common.out is None:
            raise InvalidArgument("--shard goes with --out: the parts meet in that folder")
        chosen = {key: value for key, value in given.items() if value is not None}
        return replace(base, **chosen, seed=seed, trust_remote_code=common.trust_remote_code)


LAYERS = LayersOptions()


def layers(
    model: str = BUILTIN,
    /,
    *,
    compare: Given = None,
    seed: int = 0,
    options: LayersOptions = LAYERS,
    common: Common = COMMON,
) -> None:
    """How many dimensions every layer uses on real text, beside shuffled text, random weights and noise.

    With --out: DIR/tables/*.parquet and the page DIR/index.html. An interrupted study goes on where it stopped when the same
    command is given again.

    Example: `dimscope layers builtin --text book.txt page.html --shuffles 5 -o layers`

    Parameters
    ----------
    compare
        Other models, to hold against this one on the same texts.
    seed
        Seed of shuffles, random weights and samples.
    """
    from dimscope.report.run import run_layers
    from dimscope.studies.layers import summary_frame

    settings = options.settings(common, seed)
    check_given("--compare", compare, "models")
    checkpoint, others = common.open(model), [common.open(other, "main") for other in compare or ()]
    with common.folder() as directory:
        facts, tables = run_layers(checkpoint, directory, settings, others, announce)
    told = {"model": facts["model"], "seconds": facts["seconds"]}
    if waiting := facts.get("waiting"):
        common.print(Output({**told, "waiting_for_shards": ", ".join(waiting)}))
        return
    told |= {} if common.out is None else {"page": common.out / "index.html"}
    summary = summary_frame(tables["layers"])
    if common.json:
        kept = {name: tables[name] for name in ("layers", "texts", "predictions", "similarity") if name in tables}
        common.print(Output(told, {"dimensions": summary, **kept}))
    else:  # what is the same in a whole table goes into its title
        parts = summary.partition_by("model", "text", maintain_order=True)
        common.print(Output(told, {f"dimensions {i}": part for i, part in enumerate(parts, 1)}))


def _windows(text: str | None) -> int | Literal["all"] | None:
    if text is None or text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InvalidArgument(f"--windows is a number from 1 on, or all, not {text!r}")
    return int(text)


def _thresholds(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = [0.0]
    if not all(0 < p < 100 for p in percents):
        raise InvalidArgument(f"--thresholds are percents between 0 and 100, such as 80,95, not {text!r}")
    return tuple(p / 100 for p in sorted(set(percents)))


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, whole = text.partition("/")
    if not (part.isdecimal() and whole.isdecimal() and 1 <= int(part) <= int(whole)):
        raise InvalidArgument(f"--shard is I/N with I from 1 to N, such as 1/2, not {text!r}")
    return int(part) - 1, int(whole)
