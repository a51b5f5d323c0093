"""Every wrong setting gives one sentence that names it."""

import pytest
from pydantic import ValidationError

from segraft.errors import SegraftError
from segraft.training.settings import TrainingSettings, check_settings

NOT_A_NUMBER = [float("nan"), float("inf"), "fast", None]
WRONG = [
    *(("epochs", value) for value in (0, -1, 1.5, "many", None)),
    *(("learning_rate", value) for value in (0, -1e-3, *NOT_A_NUMBER)),
    *(("schedule", value) for value in ("step", None)),
    *(("weight_decay", value) for value in (-0.1, *NOT_A_NUMBER)),
    *(("loss", value) for value in ("dice", "", None)),
    *(("volumes", value) for value in (0, 1.5)),
    *(("patches", value) for value in (0, -2)),
    *(("patches_at_once", value) for value in (0, 1.5, "all")),
    *(("foreground", value) for value in (-0.01, 1.01, *NOT_A_NUMBER)),
    *(("contrast_copies", value) for value in (-1, 1.5, "some", None)),
    *(("augmentation", value) for value in ("wild", "", None, True)),
    *(("flip", value) for value in ("perhaps", 2)),
    *(("stop_when_converged", value) for value in ("perhaps", None)),
    *(("seed", value) for value in (-1, 0.5)),
    *(("device", value) for value in ("tpu", "cuda:0")),
    *(("precision", value) for value in ("64", 32, 8)),
    *(("devices", value) for value in (0, -1, 1.5, "all", None)),
    *(("nodes", value) for value in (0, "two")),
    *(("recompute", value) for value in ("decoder", None, 3)),
    ("learning_rte", 1e-3),
]


def test_defaults_are_settings():
    assert check_settings() == TrainingSettings()


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_one_sentence(name, value):
    with pytest.raises(SegraftError) as caught:
        check_settings(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"training setting {name} = {value!r}: ")
    assert text.endswith(".")
    assert "\n" not in text


def test_groups_of_patches_are_for_one_process():
    with pytest.raises(SegraftError, match=r"^training settings: patches_at_once is for one process"):
        check_settings(patches_at_once=1, devices=2)


def test_records_leave_out_what_is_not_set():
    assert "patches_at_once" not in check_settings().model_dump()
    assert check_settings(patches_at_once=2).model_dump(mode="json")["patches_at_once"] == 2


def test_every_setting_is_checked():
    assert {name for name, _ in WRONG} >= set(TrainingSettings.model_fields)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [("loss", "dice", "dice_ce, overlap"), ("augmentation", "wild", "none, standard, elastic")],
)
def test_the_choices_are_named_in_the_message(name, value, choices):
    with pytest.raises(SegraftError, match=f"unknown {name} '{value}': choose one of {choices}"):
        check_settings(**{name: value})


def test_of_several_wrong_values_the_first_is_told():
    with pytest.raises(SegraftError, match="epochs = 0"):
        check_settings(epochs=0, learning_rate=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 1), ("foreground", 0), ("foreground", 1), ("weight_decay", 0), ("contrast_copies", 0)],
)
def test_the_ends_of_ranges_belong_to_them(name, value):
    assert getattr(check_settings(**{name: value}), name) == value


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        check_settings().epochs = 3


def test_settings_survive_json():
    settings = check_settings(
        epochs=3, loss="overlap", precision="bf16", augmentation="elastic", recompute=("decoder", r"encoder\.\d")
    )
    assert check_settings(**settings.model_dump(mode="json")) == settings
