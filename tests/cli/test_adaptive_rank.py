"""Methods that adapt their rank, from the command line: trained, inspected, used."""

import pytest


@pytest.fixture
def adapt(segraft, work, tmp_path):
    """adapt(*more): a short training into `out`."""

    def run(*more):
        return segraft(
            *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "2", "--rank", "4"),
            *("--epochs", "3", "--all-epochs", "--device", "cpu", "--train", "head", "--out", tmp_path / "out", *more),
        )

    return run


def test_an_adapter_tells_its_rank_in_use_and_segments_with_it(adapt, segraft, work, tmp_path):
    done = adapt("--method", "arena", "--rank-control", '{"penalty": 50}')
    assert done.code == 0, done.err
    assert "in use on average" in done.out
    assert "peak memory" in done.out
    described = segraft("inspect", tmp_path / "out", "--json").json
    ranks = described["ranks"].values()
    assert {start for _, start in ranks} == {4}
    used = sum(now for now, _ in ranks)
    assert 0 < used < 4 * len(ranks)
    recorded = described["training"]["ranks"]
    assert len(recorded) == 3
    assert recorded[-1] == pytest.approx(used / len(ranks))
    assert recorded == sorted(recorded, reverse=True)
    assert described["training"]["peak_bytes"] > 0
    shown = segraft("inspect", tmp_path / "out").out
    assert f"Rank in use: {used} of {4 * len(ranks)} directions" in shown
    assert "█" in shown
    assert "░" in shown
    scan = next((work / "D" / "imagesTr").iterdir())
    assert segraft("predict", tmp_path / "out", scan, "--out", tmp_path / "mask.nii.gz").code == 0


def test_dropped_directions_count_neither_in_the_file_nor_in_what_trained(adapt, segraft, tmp_path):
    sizes = []
    for penalty in ("0", "80"):
        done = adapt("--method", "arena", "--rank-control", f'{{"penalty": {penalty}}}', "--overwrite", "--json").json
        described = segraft("inspect", tmp_path / "out", "--json").json
        assert done["parameters"]["trainable"] == described["parameters"]
        sizes.append((described["parameters"], described["bytes"]))
    assert sizes[1] < sizes[0]
    assert sizes[1][1] < sizes[0][1]


def test_ada_lora_ends_with_its_budget(adapt, segraft, tmp_path):
    done = adapt("--method", "ada_lora", "--rank-control", '{"target": 2}')
    assert done.code == 0, done.err
    ranks = segraft("inspect", tmp_path / "out", "--json").json["ranks"]
    assert sum(now for now, _ in ranks.values()) == 2 * len(ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "arena", "--rank-control", "0.5"), "--rank-control '0.5' is no JSON object"),
        (("--method", "arena", "--rank-control", '{"lambda": 1}'), "has no setting 'lambda': it has penalty, step"),
        (("--method", "lora", "--rank-control", '{"kind": "proximal"}'), "'proximal' works on a gate"),
        (("--method", "ada_lora", "--rank-control", '{"target": 9}'), "9 directions per weight"),
        (("--method", "arena", "--shots", "50"), "50 cases to adapt to were asked for"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(adapt, tmp_path, options, message):
    done = adapt(*options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_the_few_shot_papers_table(segraft):
    table = segraft("params", "--paper", "arena")
    assert table.code == 0
    for text in ("62.19 M", "69,120", "899.7"):
        assert text in table.out
