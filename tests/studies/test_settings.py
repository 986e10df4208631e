"""Settings of every study: a value of the wrong type is refused by name before anything runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimscope import studies
from dimscope.errors import InvalidArgument
from dimscope.studies.study import Study
from dimscope.texts.texts import text_from_string

FIELDS = [(study, field.name) for study in studies.STUDIES for field in fields(study.settings)]
OPENED = {"texts", "compare"}  # strings, or what is opened from them


@pytest.mark.parametrize(("study", "name"), FIELDS, ids=[f"{study.name}.{name}" for study, name in FIELDS])
def test_a_value_of_another_type_is_refused_by_its_name(study: Study, name: str) -> None:
    wrong: list[Any] = [2.5j, [None], [2.5j]]
    if name not in OPENED:
        wrong.append(object())
    for value in wrong:
        with pytest.raises(InvalidArgument, match=f"`{name}`"):
            study.settings(**{name: value})


@pytest.mark.parametrize("value", ["3", 2.5, True, None, float("nan"), [3]], ids=repr)
def test_a_count_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"`shuffles` must be a whole number, got"):
        studies.LAYERS.settings(shuffles=value)


def test_the_message_says_what_is_allowed() -> None:
    with pytest.raises(InvalidArgument, match=r"`windows` must be a whole number, all or None, got 'some'"):
        studies.LAYERS.settings(windows="some")
    with pytest.raises(InvalidArgument, match=r"`curve` must be True or False, got 'yes'"):
        studies.LAYERS.settings(curve="yes")


def test_numbers_of_numpy_lone_values_and_paths_are_taken() -> None:
    settings = studies.LAYERS.settings(shuffles=np.int64(3), thresholds=0.9, texts=Path("a.txt"), compare="builtin")
    assert type(settings.shuffles) is int
    assert (settings.shuffles, settings.thresholds, settings.texts) == (3, (0.9,), ("a.txt",))
    assert settings.compare == ("builtin",)
    text = text_from_string("words")
    assert studies.LAYERS.settings(texts=[text, "b.txt"]).texts == (text, "b.txt")
