"""What cannot run is refused before anything is read or trained."""

import pytest

from segraft.errors import SegraftError
from segraft.studies.checking import check_study
from segraft.studies.reading import checked, read_study, shipped
from segraft.studies.running import run_study


def study(**changes):
    content = {"name": "toy", "title": "Toy", "bases": {"small": {"network": "unet"}}, "arms": [{"base": "small"}]}
    return checked({**content, **changes}, "toy")


@pytest.mark.parametrize("name", shipped())
def test_what_comes_with_the_package_can_run(name):
    check_study(read_study(name))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bases": {"small": {"network": "unett"}}}, ["small", "unett", "multi_view_unet"]),
        ({"bases": {"small": {"network": "unet", "arguments": {"width": 3}}}}, ["small", "width"]),
        ({"arms": [{"base": "small", "strategies": ["shallow"]}]}, ["small", "shallow", "UNet"]),
        ({"preparation": {"patches": [8, 8, 1]}}, ["preparation patches"]),
        ({"preparation": {"orientation": "RAX"}}, ["preparation orientation"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(changes, says, tmp_path):
    with pytest.raises(SegraftError) as refused:
        run_study(study(**changes), tmp_path / "out")
    assert all(words in str(refused.value) for words in says)
    assert not (tmp_path / "out").exists()
