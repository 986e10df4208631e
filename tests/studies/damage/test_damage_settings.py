"""What a study of damage is asked becomes points: settled on the model's dimensions, each once, with its own name."""

import math
from collections.abc import Callable

import pytest
import torch

from dimscope.cli.app import main
from dimscope.cli.damage import changes_of
from dimscope.errors import InvalidArgument
from dimscope.interventions.maps import LinearMap
from dimscope.interventions.perturbations import PERTURBATIONS, Mark, make_map, perturbation
from dimscope.interventions.table_summary import TableSummary
from dimscope.studies.damage.changes import DEFAULT_CHANGES, RequestedStep, parse_change, parse_step
from dimscope.studies.damage.curves import kind_mark, kind_name
from dimscope.studies.damage.plan import Point, plan_points
from dimscope.studies.damage.settings import PRESETS, DamageSettings
from dimscope.vectors.moments import moments

NOISES = [0.01, 0.1, 0.5, 1, 2, 3, 4, 5, 10]
SCALES = [0.1, 0.5, 1, 1.5, 2, 5, 10]
HUNDREDS = [100, 200, 300, 400, 500, 600, 700, 800]
EXAMPLES = {"dimensions": "9", "standard deviations": "0.5", "factor": "2", "bits": "4", "": "on"}


def points(*changes: str, dim: int = 32, output: int | None = None, **settings) -> list[Point]:
    dims = {"input": dim} | ({} if output is None else {"output": output})
    return plan_points(DamageSettings(changes=changes, **settings), dims)


def strengths(found: list[Point], kind: str) -> list[float]:
    """The strengths of a kind in the order in which they are tried, each once."""
    return list(dict.fromkeys(point.strength for point in found if point.kind == kind))


# ---- points --------------------------------------------------------------------------------------------------------


def test_the_undamaged_model_is_the_first_point_and_there_is_one_of_it():
    found = points("truncate:8", "noise:1", sides=("input", "both"), output=32)
    assert found[0] == Point()
    assert (found[0].kind, found[0].label, found[0].strength, found[0].seed) == ("undamaged", "undamaged", None, None)
    assert [point for point in found if not point.steps] == [Point()]


@pytest.mark.parametrize(
    ("percent", "dim", "k"),
    [("75%", 32, 24), ("75%", 896, 672), ("12.5%", 64, 8), ("100%", 7, 7), ("0%", 7, 0), ("67%", 10, 7)],
)
def test_percentages_settle_on_the_dimensions_of_the_model(percent, dim, k):
    for kind in ("truncate", "truncate-centred", "remove-leading", "coordinates", "project", "project-rescaled"):
        [point] = points(f"{kind}:{percent}", dim=dim, draws=1)[1:]
        assert point.steps == ((kind, float(k)),)


def test_the_same_change_asked_twice_is_one_point():
    found = points(
        "truncate:75%", "truncate:24", "truncate:24.0", "project:50%", "project:16", "truncate:74.9%", draws=2
    )
    assert [(point.label, point.seed) for point in found[1:]] == [
        ("truncate 24", None),
        ("project 16", 0),
        ("project 16", 1),
    ]


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_what_is_random_is_drawn_with_every_seed_and_everything_else_once(kind):
    found = points(f"{kind}:{EXAMPLES[PERTURBATIONS[kind].unit]}", draws=4, seed=10)
    assert [point.seed for point in found[1:]] == ([10, 11, 12, 13] if PERTURBATIONS[kind].random else [None])
    assert {point.kind for point in found[1:]} == {kind}


def test_a_chain_is_random_where_one_of_its_steps_is():
    found = points("truncate:16+noise:0.1", "truncate:16+scale:2", draws=3)
    assert [(point.kind, point.seed) for point in found[1:]] == [
        ("truncate+noise", 0), ("truncate+noise", 1), ("truncate+noise", 2), ("truncate+scale", None)
    ]  # fmt: skip
    assert found[1].label == "truncate 16 + noise 0.1"
    assert found[1].steps == (("truncate", 16.0), ("noise", 0.1))
    assert (found[1].strength, found[1].n_kept) == (None, None)  # of which step would it be


def test_every_change_is_tried_on_every_side_in_the_order_asked():
    found = points("scale:2", "truncate:8", sides=("output", "input"), output=32)
    assert [(point.side, point.label) for point in found[1:]] == [
        ("output", "scale 2"), ("output", "truncate 8"), ("input", "scale 2"), ("input", "truncate 8")
    ]  # fmt: skip


def test_a_side_is_settled_on_the_width_of_its_own_table():
    """Both sides at once can keep no more dimensions than the narrower table has."""
    found = points("truncate:50%", dim=32, output=16, sides=("input", "output", "both"))
    assert [(point.side, point.strength) for point in found[1:]] == [("input", 16), ("output", 8), ("both", 8)]
    with pytest.raises(InvalidArgument, match="from 0 to 16, got 20"):
        points("truncate:20", dim=32, output=16, sides=("both",))


@pytest.mark.parametrize("side", ["output", "both"])
def test_a_model_without_an_output_table_has_no_such_side(side):
    with pytest.raises(InvalidArgument, match=f"`sides` must be input for a model without an output table, got {side}"):
        points("truncate:8", sides=(side,))


def test_labels_and_slugs_tellchanges_of_and_points_apart():
    """A label names a change, a slug a point: one of its sides with one of its seeds."""
    found = points(
        "truncate:8", "truncate:9", "truncate-centred:8", "project:8", "project-rescaled:8", "noise:8", "noise:0.8",
        "rotate", "truncate:8+noise:8", "noise:8+truncate:8", "truncate:8+project:8", "scale:0.00001",
        "scale:100000", "scale:-2",
        sides=("input", "output", "both"), output=32, draws=3,
    )  # fmt: skip
    changes = {point.label: point.steps for point in found}
    assert len(changes) == 15  # the fourteen, and none
    assert all(changes[point.label] == point.steps for point in found)
    assert len({point.slug for point in found}) == len(found) == len(set(found))
    for point in found:
        assert all(character.isalnum() or character in "-" for character in point.slug)  # it names a file


def test_a_slug_is_the_same_in_every_process(run_python):
    program = """
from dimscope.studies.damage.plan import plan_points
from dimscope.studies.damage.settings import DamageSettings
settings = DamageSettings(changes=("project:75%", "truncate:600+noise:0.1"))
print(*[point.slug for point in plan_points(settings, {"input": 896})], sep="\\n")
"""
    told = run_python("-c", program, env={"PYTHONHASHSEED": "77"})
    assert told.stdout.split() == [point.slug for point in points("project:75%", "truncate:600+noise:0.1", dim=896)]


def test_what_is_kept_is_said_of_what_keeps_dimensions_only():
    kept = {point.kind: point.n_kept for point in points(
        "truncate:8", "truncate-centred:8", "coordinates:8", "project:8", "project-rescaled:8", "project-sparse:8",
        "remove-leading:8", "noise:8", "scale:8", "quantise:8", "rotate", "truncate:8+project:8", draws=1,
    )}  # fmt: skip
    keeping = {"truncate", "truncate-centred", "coordinates", "project", "project-rescaled", "project-sparse"}
    assert {kind for kind, k in kept.items() if k == 8.0} == keeping
    assert {kind for kind, k in kept.items() if k is None} == kept.keys() - keeping


def test_the_sweep_of_the_common_kinds_where_nothing_is_asked():
    found = plan_points(DamageSettings(), {"input": 64})
    for kind in ("truncate", "project", "project-rescaled"):
        assert strengths(found, kind) == [56, 48, 40, 32, 24, 16, 8]
    for kind in ("noise", "shift"):
        assert strengths(found, kind) == [0.1, 0.5, 1, 2]
    assert strengths(found, "scale") == [0.5, 2]
    # truncate and scale once; four random kinds with five seeds
    assert len(found) == 1 + 7 + 2 + 5 * (7 + 7 + 4 + 4)
    assert len(found) == len(set(found))
    assert all(len(chain) == 1 for chain in DEFAULT_CHANGES)


# ---- the notebook --------------------------------------------------------------------------------------------------


def test_the_notebooks_numbers_are_exactly_those_in_896_dimensions():
    found = plan_points(DamageSettings(**PRESETS["notebook"]), {"input": 896})
    assert strengths(found, "truncate") == [*HUNDREDS, 830, 850, 890]
    assert strengths(found, "project") == HUNDREDS
    assert strengths(found, "project-rescaled") == sorted([*HUNDREDS, 650])
    assert strengths(found, "noise") == NOISES
    assert strengths(found, "scale") == SCALES
    assert strengths(found, "shift") == [0.1, 0.5, 1, 2]
    assert {point.kind for point in found[1:]} == {"truncate", "project", "project-rescaled", "noise", "scale", "shift"}
    assert len(found) == 1 + 11 + 7 + 3 * (8 + 9 + 9 + 4)


@pytest.mark.parametrize("dim", [1, 7, 64, 896, 4096])
def test_the_notebooks_numbers_are_shares_of_other_models_without_a_point_twice(dim):
    found = plan_points(DamageSettings(**PRESETS["notebook"]), {"input": dim})
    assert len(found) == len(set(found)) == len({point.slug for point in found})
    wanted = dict.fromkeys(float(round(k * dim / 896)) for k in (*HUNDREDS, 830, 850, 890))
    assert strengths(found, "truncate") == list(wanted)
    assert strengths(found, "noise") == NOISES  # in standard deviations, whatever the width


def test_the_notebook_reads_512_tokens_and_asks_its_five_prompts():
    settings = DamageSettings(**PRESETS["notebook"])
    assert (settings.windows, settings.length, settings.texts) == (4, 128, ("builtin:prose",))
    assert len(settings.prompts) == 5
    assert "Write a poem about pytorch" in settings.prompts
    assert settings.system is not None
    assert settings.system.startswith("You are an autocorrelating model.")
    assert (settings.decoding, settings.new_tokens) == ("greedy", 24)


# ---- a new kind ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror():
    """Return the name of a perturbation that is registered while the test runs: a reflection, of any factor."""

    @perturbation("reflection", "factor", Mark("#000000"), expected=None, random=True, stronger="harsher")
    def mirror_rows(table: TableSummary, strength: float, seed: int) -> LinearMap:
        """Turn every row around.

        And no more than the first line is its help.
        """
        return LinearMap(-strength * torch.eye(table.dim, dtype=torch.float64))

    yield "mirror-rows"
    del PERTURBATIONS["mirror-rows"]


def test_a_new_perturbation_is_one_decorated_function(mirror, capsys):
    assert DamageSettings(changes=(f"{mirror}:2",)).changes == ("mirror-rows:2",)
    steps = points(f"{mirror}:2", f"truncate:8+{mirror}:3", draws=2)
    assert [(point.label, point.seed) for point in steps[1:]] == [
        ("mirror-rows 2", 0), ("mirror-rows 2", 1), ("truncate 8 + mirror-rows 3", 0), ("truncate 8 + mirror-rows 3", 1)
    ]  # fmt: skip
    assert PERTURBATIONS[mirror].about == "Turn every row around."
    assert (kind_name(mirror), kind_mark(mirror)) == ("reflection", Mark("#000000"))
    rows = torch.arange(6, dtype=torch.float64).view(2, 3)
    change = make_map(mirror, TableSummary(moments([rows])), 2.0)
    assert torch.equal(change(rows, torch.arange(2)), -2 * rows)
    assert main(["damage", "--help"]) == 0
    assert "--mirror-rows" in capsys.readouterr().out


# ---- reading what was asked ----------------------------------------------------------------------------------------


def test_a_strength_is_a_number_or_a_share():
    assert parse_step("truncate", "600") == RequestedStep("truncate", 600.0)
    assert parse_step("truncate", "75%") == RequestedStep("truncate", 75.0, percent=True)
    assert parse_step("noise", "1e-2") == RequestedStep("noise", 0.01)
    assert parse_step("scale", "-1") == RequestedStep("scale", -1.0)
    assert parse_step("rotate", "on") == parse_step("rotate", None) == RequestedStep("rotate", 0.0)


def test_a_chain_is_read_with_or_without_spaces():
    wanted = (RequestedStep("truncate", 75.0, percent=True), RequestedStep("rotate", 0.0), RequestedStep("noise", 0.1))
    for text in ("truncate:75%+rotate+noise:0.1", " truncate : 75% + rotate:on + noise: 0.1 "):
        assert parse_change(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a perturbation is one of truncate, .*, got ''"),
        ("blur:3", "got 'blur'"),
        ("truncate:8+", "got ''"),
        ("truncate:8,16", "truncate takes dimensions, .* got '8,16'"),
        ("truncate", "truncate takes dimensions, such as 100 or 75%, got 'nothing'"),
        ("truncate:", "got 'nothing'"),
        ("truncate:most", "got 'most'"),
        ("truncate:%", "got '%'"),
        ("truncate:75%%", "got '75%%'"),
        ("noise", "noise takes standard deviations"),
        ("rotate:3", "rotate has no strength: pass rotate:on, got '3'"),
        ("rotate:75%", "rotate has no strength"),
    ],
)
def test_what_is_no_change_is_refused(text, message):
    with pytest.raises(InvalidArgument, match=message):
        parse_change(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truncate:33", "truncate takes a number of dimensions from 0 to 32, got 33"),
        ("project:-1", "from 0 to 32, got -1"),
        ("truncate:1.5", "from 0 to 32, got 1.5"),
        ("truncate:104%", "from 0 to 32, got 33"),
        ("truncate:nan", "got nan"),
        ("project:inf", "got inf"),
        ("noise:-0.5", "noise takes standard deviations from 0 on, got -0.5"),
        ("noise:nan", "got nan"),
        ("shift:inf", "got inf"),
        ("scale:nan", "scale takes a finite number, got nan"),
        ("scale:-inf", "scale takes a finite number, got -inf"),
        ("quantise:1", "a number of bits from 2 to 16, got 1"),
        ("quantise:17", "got 17"),
        ("quantise:2.5", "got 2.5"),
        ("noise:5%", "noise takes standard deviations, so 5% has no meaning"),
        ("scale:50%", "scale takes factor, so 50% has no meaning"),
        ("truncate:8+noise:-1", "got -1"),
    ],
)
def test_strengths_that_a_change_cannot_have_are_refused_before_there_is_a_point(text, message):
    with pytest.raises(InvalidArgument, match=message):
        points("truncate:8", text)


# ---- the options of the command ------------------------------------------------------------------------------------


def test_options_take_lists_with_commas():
    options = {"truncate": ("8,75%", "4"), "noise": ("0.1, 1",), "rotate": ("on",)}
    changes = ("truncate:8", "truncate:75%", "truncate:4", "noise:0.1", "noise:1", "rotate:on")
    assert changes_of(options, rescaled=False) == changes
    assert changes_of({}, rescaled=False) == ()


def test_rescaled_adds_the_projections_times_d_over_k():
    options = {"project": ("8,16",), "project-rescaled": ("4",), "truncate": ("8",)}
    assert changes_of(options, rescaled=True) == (
        "project:8", "project:16", "project-rescaled:8", "project-rescaled:16", "project-rescaled:4", "truncate:8",
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match="`rescaled` needs `project`"):
        changes_of({"truncate": ("8",)}, rescaled=True)


@pytest.fixture
def parsed(monkeypatch) -> Callable[..., DamageSettings]:
    """Return `parsed(*arguments)`: the settings with which `dimscope damage` runs the study."""
    chosen: list[DamageSettings] = []
    monkeypatch.setattr("dimscope.cli.damage.run_command", lambda study, model, own, common, watch: chosen.append(own))

    def parse(*arguments: str) -> DamageSettings:
        assert main(["damage", *arguments]) == 0
        return chosen[-1]

    return parse


def test_options_override_a_preset_and_kinds_replace_its_changes(parsed):
    preset = PRESETS["notebook"]
    whole = parsed("--preset", "notebook", "--new-tokens", "2", "--draws", "1")
    assert (whole.preset, whole.new_tokens, whole.draws, whole.windows) == ("notebook", 2, 1, 4)
    assert (whole.changes, whole.prompts, whole.system) == (preset["changes"], preset["prompts"], preset["system"])
    own = parsed("--preset", "notebook", "--truncate", "8", "--prompt", "Hello", "--windows", "2")
    assert (own.changes, own.prompts, own.windows, own.preset) == (("truncate:8",), ("Hello",), 2, "notebook")


def test_options_of_prompts(parsed):
    prompts = ("--prompt", "Hello", "Bye", "--text-draws", "2", "--decoding", "model")
    settings = parsed(*prompts, "--system", "Be kind.")
    assert (settings.prompts, settings.text_draws, settings.decoding) == (("Hello", "Bye"), 2, "model")
    assert (settings.system, settings.chat) == ("Be kind.", None)
    assert [parsed(*prompts, option).chat for option in ("--chat", "--plain")] == [True, False]


# ---- settings ------------------------------------------------------------------------------------------------------


def test_a_lone_string_is_one_change_never_its_letters():
    settings = DamageSettings(changes="truncate:50%", texts="a.txt", prompts="Once", sides="both")
    assert (settings.changes, settings.texts) == (("truncate:50%",), ("a.txt",))
    assert (settings.prompts, settings.sides) == (("Once",), ("both",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"changes": ("blur:3",)}, "a perturbation is one of"), ({"windows": 0}, "`windows` must be 1 or more, got 0"),
        ({"length": 1}, "`length` must be 2 or more"), ({"draws": 0}, "`draws` must be"),
        ({"sides": ("middle",)}, "`sides` must be input, output or both, got 'middle'"), ({"texts": ()}, "`texts` takes"),
        ({"system": "Be brief.", "chat": False}, "`system` needs a chat template"), ({"seed": -1}, "`seed` must be"),
        ({"decoding": "beam"}, "`decoding` must be greedy, sample or model"), ({"seed": 2**63 - 1}, "`draws` 5 exceeds"),
    ],
)  # fmt: skip
def test_settings_out_of_range_raise_at_once(values, message):
    with pytest.raises(InvalidArgument, match=message):
        DamageSettings(**values)


def test_the_strength_of_a_kind_is_finite_in_every_default():
    for chain in (*DEFAULT_CHANGES, *map(parse_change, PRESETS["notebook"]["changes"])):
        for step in chain:
            assert math.isfinite(step.amount)
            assert step.percent == (PERTURBATIONS[step.kind].unit == "dimensions")
