"""What the page shows of damage: on which texts, and under which names."""

from dimscope.interventions.perturbations import PERTURBATIONS, Mark
from dimscope.page.section import Tables, table
from dimscope.page.theme import series_mark
from dimscope.page.wording import count
from dimscope.studies.damage.losses import Draws, Losses, all_losses
from dimscope.studies.reading import GENERATED


def shown_losses(tables: Tables) -> list[Losses]:
    """Return what changes cost where the loss of the undamaged model is known; nothing without the tables."""
    damage, windows = table(tables, "damage"), table(tables, "windows")
    if damage is None or windows is None:
        return []
    return [losses for losses in all_losses(damage, windows) if losses.readable]


def kind_name(kind: str) -> str:
    """Return the title of a kind of change, as in a sentence: "truncation by SVD"; of a chain its own name."""
    return PERTURBATIONS[kind].title if kind in PERTURBATIONS else kind


def change_name(draws: Draws) -> str:
    """Return a change as in a sentence: "truncation by SVD to 32 dimensions", "noise of 1 sd", "scaling by 2"."""
    unit = PERTURBATIONS[draws.kind].unit if draws.kind in PERTURBATIONS else ""
    name = "one shift" if draws.kind == "shift" else kind_name(draws.kind)
    if unit == "dimensions":
        return f"{name} {'of' if draws.kept_share is None else 'to'} {draws.strength:,.0f} dimensions"
    strengths = {
        "standard deviations": f" of {draws.strength:g} sd",
        "factor": f" by {draws.strength:g}",
        "bits": f" to {draws.strength:g} bits",
    }
    return f"{name}{strengths.get(unit, '')}{' for all tokens' if draws.kind == 'shift' else ''}"


def kind_mark(kind: str) -> Mark:
    """Return how a kind of change is drawn; a chain of several gets a mark by its name."""
    return PERTURBATIONS[kind].mark if kind in PERTURBATIONS else series_mark(sum(kind.encode()))


def text_name(text: str) -> str:
    """Return a text as in a sentence: its name, or "text that the model generated"."""
    return "text that the model generated" if text == GENERATED else text


def tokens_read(losses: Losses, window_length: int | None) -> str:
    """Return what a loss is the mean over: "2,044 tokens of prose.txt in windows of 512 tokens"."""
    windows = f" in windows of {window_length} tokens" if window_length else ""
    return f"{count(losses.undamaged.n_predicted, 'token')} of {text_name(losses.text)}{windows}"


def unreadable_text(losses: Losses, window_length: int | None) -> str:
    """Return why a text cannot tell what a change costs."""
    loss = losses.undamaged.loss
    upper = "" if loss.high is None else f", 95% interval up to {loss.high:.3g}"
    return (
        "This text cannot tell what the model loses: the undamaged model predicts it not clearly better than its token frequencies "
        f"alone would (loss {loss.value:.3g}{upper}, entropy of the frequencies {losses.entropy:.3g} nats per token, both on "
        f"{tokens_read(losses, window_length)})"
    )
