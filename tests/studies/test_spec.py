"""What may stand in a study's file, and the one sentence that says what may not."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import segraft.studies
from segraft.errors import SegraftError
from segraft.networks import NETWORKS
from segraft.studies.planning import PLAN, Plan
from segraft.studies.reading import checked, read_study, shipped
from segraft.studies.spec import arms_of

ROOT = Path(__file__).resolve().parents[2]


def refusal(call, *arguments) -> str:
    """The message of the refusal: one sentence on one line, without pydantic's own words."""
    with pytest.raises(SegraftError) as refused:
        call(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "pydantic" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fold": 3}, ["fold: Extra inputs are not permitted"]),
        ({"name": "a/b"}, ["name"]),
        ({"title": None}, ["title"]),
        ({"folds": 1}, ["folds", "2"]),
        ({"folds": "many"}, ["folds", "integer"]),
        ({"seeds": []}, ["seeds"]),
        ({"patients": 1}, ["patients"]),
        ({"bases": {}}, ["bases"]),
        ({"arms": []}, ["arms"]),
        ({"bases": {"unet": {"network": "unet", "patiens": 3}}}, ["bases.unet.patiens"]),
        ({"bases": {"unet": {"network": "unet", "training": {"epochs": 0}}}}, ["epochs"]),
        ({"bases": {"unet": {"network": "unet", "training": {"epoch": 3}}}}, ["epoch"]),
        ({"training": {"learning_rate": -1}}, ["learning_rate", "-1"]),
        ({"training": {"loss": "dize"}}, ["dize", "dice_ce"]),
        ({"arms": [{"base": "unet", "training": {"epochs": "few"}}]}, ["epochs", "few"]),
        ({"arms": [{"base": "vnet"}]}, ["vnet", "the study has the bases unet"]),
        ({"arms": [{"base": "unet", "strategies": ["deeper"]}]}, ["deeper", "shallow, deep"]),
        ({"arms": [{"base": "unet", "methods": ["dorra"]}]}, ["dorra", "dora_c"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "ranks": [0]}]}, ["rank"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "ranks": ["high"]}]}, ["ranks", "integer"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "adapter": {"rang": 3}}]}, ["rang", "targets"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "adapter": {"rank": 3}}]}, ["rank", "no further field"]),
        ({"arms": [{"base": "unet"}, {"base": "unet", "strategies": ["none"]}]}, ["none (unet)", "twice"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "ranks": [2, 4, 2]}]}, ["dora_c 2 (unet)", "twice"]),
        ({"arms": [{"base": "unet", "strategies": ["ALL", "all"]}]}, ["all (unet)", "twice"]),
        ({"strata_ml": [50, 25]}, ["strata_ml", "rising"]),
        ({"strata_ml": "quartiles"}, ["strata_ml", "tertiles"]),
        ({"seeds": [0, 0]}, ["seeds", "differ"]),
        ({"seeds": [-1]}, ["seeds", "below 0"]),
        ({"training": {"seed": 3}}, ["seed", "seeds"]),
        ({"arms": [{"base": "unet", "methods": ["dora_c"], "adapter": {"targets": 5}}]}, ["adapter", "type"]),
        ({"reference": "the best"}, ["the best", "best strategy"]),
        ({"arms": [{"base": "unet", "methods": []}]}, ["methods"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_sentence_that_names_it(write_study, changes, says):
    path = write_study(**changes)
    message = refusal(read_study, path)
    assert str(path) in message
    for words in says:
        assert words in message


@pytest.mark.parametrize("content", ["", "just words", "- a\n- b\n", "7"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, content):
    path = tmp_path / "s.yaml"
    path.write_text(content)
    assert str(path) in refusal(read_study, path)


def test_a_file_that_is_not_yaml_is_refused_with_the_place(tmp_path):
    path = tmp_path / "s.yml"
    path.write_text("name: [a\nb: {")
    assert re.search(r"not YAML.*line 2", refusal(read_study, path))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert str(path) in refusal(read_study, path)


def test_yaml_makes_no_objects(tmp_path):
    path, made = tmp_path / "s.yaml", tmp_path / "made"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{made}']]")
    assert "not YAML" in refusal(read_study, path)
    assert not made.exists()


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path):
    assert str(tmp_path / "no.yaml") in refusal(read_study, tmp_path / "no.yaml")
    message = refusal(read_study, "smok")
    assert "no study 'smok'" in message
    assert "smoke" in message


def test_paths_are_seen_from_the_file(write_study, tmp_path, monkeypatch):
    path = write_study(data="D/dataset.json", pretrain_data=str(tmp_path / "elsewhere" / "dataset.json"))
    monkeypatch.chdir("/")
    study = read_study(path)
    assert study.data == tmp_path / "D" / "dataset.json"
    assert study.pretrain_data == tmp_path / "elsewhere" / "dataset.json"


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_read(name):
    study = read_study(name)
    assert study.name == name
    assert study.data is None, "where the cohort is depends on the machine"
    assert {base.network for base in study.bases.values()} <= set(NETWORKS)


def test_the_haemorrhage_study_is_the_papers():
    """Section 2 of the paper: 6 methods at 8 ranks on the U-Net, 6 strategies on its multi-view U-Net, 3 folds."""
    study = read_study("sah")
    arms = [arm for group in study.arms for arm in arms_of(group)]
    factors = {(arm.method, arm.rank) for arm in arms if arm.rank is not None}
    methods = ("lora_c", "conv_lora", "cp_lora", "dora_c", "conv_dora", "cp_dora")
    assert factors == {(method, rank) for method in methods for rank in (2, 4, 8, 16, 32, 64, 96, 128)}
    strategies = {arm.strategy for arm in arms if arm.base == "multi_view"}
    assert strategies == {"none", "shallow", "deep", "encoding", "decoding", "all"}
    assert (study.patients, study.folds, study.strata_ml) == (30, 3, (25, 50, 100, 300))
    adapting, pretraining = study.settings({}, seed=0), study.bases["unet"].training
    assert (adapting.epochs, adapting.learning_rate, adapting.volumes, adapting.patches) == (20, 0.001, 2, 1)
    assert (pretraining["epochs"], pretraining["learning_rate"], pretraining["volumes"]) == (60, 0.001, 2)


def test_the_shipped_studies_are_in_the_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["segraft"]
    package = Path(segraft.studies.__file__).parents[1]
    files = sorted((package / "studies" / "library").iterdir())
    assert [file.stem for file in files] == list(shipped())
    assert {"smoke", "sah"} <= set(shipped())
    for file in files:
        assert any(fnmatch(file.relative_to(package).as_posix(), pattern) for pattern in patterns), file


def test_a_study_extends_another(write_study, tmp_path):
    below = write_study(training={"epochs": 2, "volumes": 3}, seeds=[1, 2])
    above = tmp_path / "deeper" / "above.yaml"
    above.parent.mkdir()
    change = {"extends": "../tiny.yaml", "name": "above", "seeds": [5], "training": {"epochs": 9}}
    above.write_text(yaml.safe_dump(change))
    study = read_study(above)
    assert (study.name, study.title, study.seeds) == ("above", "Tiny", (5,))
    assert study.training == {"epochs": 9, "volumes": 3}
    assert study.data == read_study(below).data


def test_a_study_that_extends_itself_is_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\n")
    assert "extends itself" in refusal(read_study, tmp_path / "a.yaml")


def test_what_is_extended_must_be_there(write_study, tmp_path):
    path = tmp_path / "above.yaml"
    path.write_text("extends: nowhere.yaml\n")
    assert "nowhere.yaml" in refusal(read_study, path)


def test_a_plan_keeps_the_study(make_study, tmp_path):
    """As JSON, with tuples, paths and all."""
    study = make_study(seeds=[3, 4], strata_ml=[1.5, 2], reference="none (unet)")
    Plan(study, {}, (), {}, {}).write(tmp_path / PLAN)
    assert Plan.read(tmp_path / PLAN).study == study


def test_values_without_a_file_are_checked_too():
    assert "the study here" in refusal(checked, {"name": "x"}, "here")
