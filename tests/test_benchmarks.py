"""The benchmark's arithmetic and its report, on numbers worked out by hand. Nothing here measures time."""

import importlib
import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from segraft.adapters import PRESETS
from segraft.errors import SegraftError
from segraft.networks import UNet

ROOT = Path(__file__).resolve().parents[1]


def _import(module: str):
    """A module of the folder `benchmarks`, which is not installed, whatever the working directory."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"benchmarks.{module}")


cases, memory, overhead, profiling, ratios, report, store, subject, targets, timing, variants, bench = map(
    _import,
    (
        "cases",
        "memory",
        "overhead",
        "profiling",
        "ratios",
        "report",
        "store",
        "subject",
        "targets",
        "timing",
        "variants",
        "run",
    ),
)


def row(step, *, evaluation=None, peak=100, **more):
    return {"step": step, "evaluation": evaluation, "memory": {"resident": 10, "peak": peak}, "note": ""} | more


def run(group, rows):
    return {
        "group": group,
        "date": "2026-01-02T03:04:05+00:00",
        "source": "abc",
        "rounds": 3,
        "references": ["bound", "full"],
        "variants": rows,
    }


REFERENCES = {"bound": row([1.0, 2.0, 4.0], peak=80), "full": row([2.0, 4.0, 8.0], evaluation=[1.0, 1.0, 2.0])}
OURS = {"method": "conv_dora", "rank": 8}
PEER = {"method": "PEFT DoRA", "rank": 8, "nearest": "conv_dora r8"}


def results():
    made = {
        "format": 1,
        "device": "cpu",
        "machine": {"cpu": "Abacus", "cores": 2, "device": "cpu", "system": "Linux"},
        "versions": {"torch": "2.0"},
        "settings": {"threads": 2, "malloc": "default"},
        "networks": {},
    }
    group = {
        **REFERENCES,
        "conv_dora r8": row([1.2, 2.4, 6.0], evaluation=[1.0, 1.01, 2.0], peak=90, **OURS),
        "dora_c r8": row([3.0, 6.0, 11.25], evaluation=[1.0, 1.0, 2.0], method="dora_c", rank=8),
        "PEFT DoRA r8": row([2.4, 4.8, 9.0], evaluation=[2.0, 2.0, 4.0], peak=180, **PEER),
        "LyCORIS DoRA r8": {"method": "LyCORIS DoRA", "rank": 8, "nearest": "conv_dora r8", "failed": "No: | module"},
    }
    options = {"eager": row([2.0, 2.0, 2.0]), "torch.compile": row([1.0, 1.0, 1.0], peak=50)}
    network = {
        "name": "unet",
        "title": "U-Net, 8²",
        "family": "2D U-Net",
        "shape": [1, 1, 8, 8],
        "precision": "float32",
    }
    store.add_run(made, network, run("DoRA r8", group))
    store.add_run(made, network, run("options", options) | {"references": ["eager"]})
    return made


class TestRatios:
    def test_pairs_come_before_medians(self):
        """2/1, 3/2 and 8/4: the median of ratios is 2, the ratio of medians would be 1.5."""
        assert ratios.paired([2.0, 3.0, 8.0], [1.0, 2.0, 4.0]) == ratios.Ratio(2.0, 1.75, 2.0)

    def test_one_round(self):
        assert ratios.paired([3.0], [2.0]) == ratios.Ratio(1.5, 1.5, 1.5)

    def test_rounds_must_match(self):
        with pytest.raises(ValueError, match="shorter"):
            ratios.paired([1.0, 2.0], [1.0])

    def test_evaluation_is_compared_with_the_base_beside_it(self):
        made = results()
        network = ratios.Network(made["networks"]["unet"])
        assert network.evaluation_over_base("conv_dora r8").high == 1.005  # each round's own base
        beside = row([], evaluation=[1.0, 3.0, 4.0], base=[1.0, 2.0, 4.0], **OURS)
        alone = {"bound": row([]), "full": row([]), "conv_dora r8": beside}
        record = made["networks"]["unet"] | {"name": "unet"}
        store.add_run(made, record, run("DoRA r8, evaluation", alone))
        network = ratios.Network(made["networks"]["unet"])
        assert network.evaluation_over_base("conv_dora r8").high == 1.25
        assert network.over("conv_dora r8", "bound").median == 1.2  # steps are of the run that has them

    def test_what_took_steps_alone_is_not_judged_by_its_evaluation(self):
        made = results()
        record = made["networks"]["unet"] | {"name": "unet"}
        steps = {"bound": row([1.0]), "full": row([2.0]), "cp_dora r8": row([1.5], method="cp_dora", rank=8)}
        store.add_run(made, record, run("DoRA r8, steps", steps))
        network = ratios.Network(made["networks"]["unet"])
        assert {name for name, _ in targets.evaluation_over_base(network)} == {"conv_dora r8", "dora_c r8"}
        assert "cp_dora r8" in {name for name, _ in targets.step_over("bound", 0, 8, network)}

    def test_nothing_is_compared_across_runs(self):
        first = run("a", {"full": row([1.0]), "x": row([2.0])})
        second = run("b", {"full": row([10.0]), "y": row([30.0])})
        network = ratios.Network({"title": "", "family": "", "runs": [first, second]})
        assert network.over("x", "full").median == 2
        assert network.over("y", "full").median == 3
        assert network.over("x", "y") is None
        assert network.seconds("full") == 10


class TestTiming:
    def test_each_is_first_in_turn(self):
        names = ["a", "b", "c", "d"]
        orders = [timing.order(names, round_) for round_ in range(8)]
        assert [first for first, *_ in orders] == names * 2
        assert all(sorted(each) == names for each in orders)
        # Nobody always follows the same one.
        assert len({each[each.index("c") - 1] for each in orders if each[0] != "c"}) > 1

    def test_every_task_in_every_round(self):
        calls = []
        tasks = {name: lambda name=name: calls.append(name) for name in "abc"}
        seconds = timing.alternate(tasks, 4, torch.device("cpu"), warm_up=True)
        assert {name: len(each) for name, each in seconds.items()} == {"a": 4, "b": 4, "c": 4}
        assert len(calls) == 3 * 5
        assert all(sorted(calls[start : start + 3]) == ["a", "b", "c"] for start in range(0, 15, 3))

    def test_the_reference_comes_beside_each_task(self, monkeypatch):
        calls = []
        lasting = {"a": 1.0, "b": 2.0, "base": 4.0}
        clock = [0.0]

        def task(name):
            calls.append(name)
            clock[0] += lasting[name]

        monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
        tasks = {name: lambda name=name: task(name) for name in "ab"}
        seconds = timing.beside(tasks, lambda: task("base"), 3, torch.device("cpu"))
        assert seconds == {"a": ([1.0] * 3, [4.0] * 3), "b": ([2.0] * 3, [4.0] * 3)}
        rounds = [
            "".join(name[0] if name != "base" else "-" for name in calls[start : start + 5])
            for start in range(0, 20, 5)
        ]
        assert rounds[1] == "--a-b"
        assert rounds[2] == "-b-a-"

    def test_nothing_to_time(self):
        assert timing.alternate({}, 3, torch.device("cpu")) == {}
        assert timing.beside({}, lambda: None, 3, torch.device("cpu")) == {}


class TestStore:
    def test_ratios_are_written_for_readers(self):
        written = results()["networks"]["unet"]["runs"][0]["variants"]["conv_dora r8"]["ratios"]
        assert written["step/bound"]["median"] == pytest.approx(1.2)
        assert written["step/full"]["quartiles"] == pytest.approx([0.6, 0.675])
        assert written["memory/full"] == 0.9

    def test_pieces_add_up(self):
        made = results()
        network = {"name": "unet", "title": "U-Net, 8²", "family": "2D U-Net"}
        again = {**REFERENCES, "conv_dora r8": row([1.0, 2.0, 4.0], **OURS)}
        store.add_run(made, network, run("DoRA r8", again))
        seen = ratios.Network(made["networks"]["unet"])
        assert len(seen.runs) == 3, "the first run has more variants, and stays"
        assert seen.over("conv_dora r8", "bound").median == 1
        assert seen.over("PEFT DoRA r8", "conv_dora r8").median == 2, "of the run that has both"
        store.add_run(made, network, run("DoRA r8", again))
        assert len(made["networks"]["unet"]["runs"]) == 3, "a run that tells nothing more is replaced"

    def test_what_is_there(self):
        made = results()
        assert store.has(made, "unet", "DoRA r8", ["full", "conv_dora r8"])
        assert not store.has(made, "unet", "DoRA r8", ["full", "LyCORIS DoRA r8"]), "it failed"
        assert not store.has(made, "unet", "LoRA r8", ["full"])
        assert not store.has(made, "other", "DoRA r8", ["full"])

    def test_settings_are_not_mixed(self, tmp_path):
        header = {"device": "cpu", "settings": {"threads": 2}}
        made = store.opened(tmp_path / "a.json", header)
        store.save(tmp_path / "a.json", made)
        assert store.opened(tmp_path / "a.json", header) == made
        with pytest.raises(SegraftError, match="other settings"):
            store.opened(tmp_path / "a.json", header | {"settings": {"threads": 4}})
        (tmp_path / "b.json").write_text("[]")
        with pytest.raises(SegraftError, match="no results file"):
            store.opened(tmp_path / "b.json", header)


def rows_of(page: str) -> list[list[str]]:
    """Cells of every line of every table."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in page.splitlines()
        if line.startswith("|")
    ]


class TestRun:
    @pytest.mark.parametrize(
        ("timed", "name", "held"),
        [
            ("all", "LoRA r4", {"step", "evaluation"}),
            ("steps", "LoRA r4, steps", {"step"}),
            ("evaluation", "LoRA r4, evaluation", {"evaluation"}),
        ],
    )
    def test_steps_or_evaluation_alone(self, timed, name, held):
        case = cases.by_name("cpu")["tiny-2d"]
        group = next(each for each in variants.groups(case, [4]) if each.name == "LoRA r4").matching("^lora_c r4$")
        found = bench.measure(case, group, 2, torch.device("cpu"), bench.Timed(timed))
        assert found["group"] == name
        mine = found["variants"]["lora_c r4"]
        assert {what for what in ("step", "evaluation") if mine.get(what)} == held
        assert mine["memory"]["peak"] > 0

    @pytest.mark.parametrize("name", ["references", "options"])
    def test_where_only_steps_are_timed_anyway_their_name_says_nothing_more(self, name):
        (group,) = (each for each in variants.groups(cases.by_name("cpu")["tiny-2d"], [4]) if each.name == name)
        assert bench.Timed.STEPS.of(group) == bench.Timed.ALL.of(group) == name


class TestOverhead:
    def test_layers_and_their_arithmetic_are_told_apart(self, monkeypatch):
        ticks = itertools.count()
        monkeypatch.setattr(overhead.time, "perf_counter", lambda: float(next(ticks)))
        net, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(1, 2)
        expected, clock = net(x), overhead.Clock()
        linear, call = functional.linear, nn.Module.__call__
        with clock.running():
            assert torch.equal(net(x), expected)
        # Of a layer: its start, the function's start and end, its end.
        assert (clock.layers, clock.arithmetic) == (2 * 3.0, 2 * 1.0)
        assert functional.linear is linear
        assert nn.Module.__call__ is call

    def test_a_network(self):
        found = overhead.measure(cases.by_name("cpu")["tiny-2d"], ["full", "dora_c r8"], 2)
        assert list(found) == ["full", "dora_c r8"]
        assert all(0 < row["beside"] < row["whole"] for row in found.values())


class TestReport:
    @pytest.fixture
    def rows(self):
        return rows_of(report.markdown({"docs/results/performance-cpu.json": results()}))

    def test_a_network(self, rows):
        assert ["bound", "1.00 (1.00–1.00)", "0.50 (0.50–0.50)", "0.80", "", ""] in rows
        mine = ["conv_dora r8", "1.20 (1.20–1.35)", "0.60 (0.60–0.68)", "0.90", "1.00 (1.00–1.00)", ""]
        assert mine in rows
        assert ["LyCORIS DoRA r8", "", "", "", "", "not measured: No: \\| module"] in rows

    def test_peers_also_where_they_win(self, rows):
        slower = ["PEFT DoRA r8", "conv_dora r8", "yes", "2.00 (1.75–2.00)", "2.00", "2.00 (1.99–2.00)", ""]
        faster = ["PEFT DoRA r8", "dora_c r8", "no", "**0.80 (0.80–0.80)**", "1.80", "2.00 (2.00–2.00)", "step"]
        assert slower in rows
        assert faster in rows

    def test_options(self, rows):
        assert ["torch.compile", "0.50 (0.50–0.50)", "0.50", ""] in rows

    def test_what_we_aim_for(self, rows):
        verdicts = {cells[0]: cells[1:] for cells in rows if cells[1:2] == ["U-Net, 8²"]}
        assert verdicts["R ≤ 8: step at most 1.30 × bound"] == [
            "U-Net, 8²",
            "3.000 (2.906–3.000)",
            "dora_c r8, worst of 2",
            "**no**",
        ]
        assert verdicts["R = 64: step at most 0.95 × full"][-1] == "not measured"
        assert verdicts["PEFT's DoRA step at least 1.15 × ours"][-1] == "yes"
        assert verdicts["unmerged evaluation at most 1.02 × base"][-1] == "yes"
        assert verdicts["peak memory at most 1 × full"][1:] == ["1.000", "dora_c r8, worst of 2", "yes"]
        assert not any("1.5 ×" in text for text in verdicts), "that is about other networks"

    def test_a_method_that_fails_reaches_nothing(self):
        made = results()
        failed = made["networks"]["unet"]["runs"][0]["variants"]["dora_c r8"]
        failed.clear()
        failed |= {"method": "dora_c", "rank": 8, "failed": "ValueError"}
        outcome = targets.judge(targets.TARGETS[0], ratios.Network(made["networks"]["unet"]))
        assert (outcome.worst, outcome.value, outcome.reached) == ("dora_c r8", None, False)

    def test_notes_come_last(self):
        page = report.markdown({"docs/results/performance-cpu.json": results()}, "## Why\n\nBecause.\n")
        assert page.endswith("## Why\n\nBecause.\n")

    def test_the_page_is_what_the_results_say(self):
        """Run `python -m benchmarks.report` after a change of the results, the notes or the generator."""
        if report.committed():
            assert report.PAGE.read_text(encoding="utf-8") == report.page()
        else:
            assert not report.PAGE.exists()


def nodes(output: torch.Tensor) -> list[str]:
    """Kinds of everything that the backward pass computes."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return [node.name() for node in seen]


class TestWhatIsMeasured:
    def test_groups(self):
        case = cases.by_name("cpu")["tiny-2d"]
        groups = variants.groups(case, [4, 64])
        assert [group.name for group in groups] == [
            "references",
            "LoRA r4",
            "DoRA r4",
            "LoRA r64",
            "DoRA r64",
            "options",
        ]
        names = [variant.name for group in groups for variant in (*group.references, *group.others)]
        assert {f"{method} r64" for method in variants.METHODS} < set(names)
        assert [variant.name for variant in groups[2].matching("PEFT").others] == ["PEFT DoRA r4"]
        assert set(variants.METHODS) <= set(PRESETS)

    def test_each_peer_has_a_nearest_method_in_its_group(self):
        for peer in variants.PEERS:
            assert variants.METHODS[peer.nearest] == peer.kind

    def test_what_a_peer_leaves_out_is_said(self):
        group = variants.methods("DoRA", 8)
        mine, theirs = group.others[0], group.others[-1]
        net = UNet(widths=(2, 4))
        assert theirs.note(net) == "1 of 8 layers left out: it skips transposed convolutions"
        assert mine.note(net) == ""
        assert theirs.note(nn.Sequential(nn.Linear(2, 2))) == ""

    def test_the_backward_pass_ends_at_the_first_output(self):
        """Of the network's 8 convolutions all but the first compute an input gradient; with the image's all do."""
        image = torch.rand(1, 1, 8, 8)
        net = variants.frozen(UNet(widths=(2, 4)))
        with_image = net(image.clone().requires_grad_())
        without = variants.frozen_from_first_output(net)(image)
        assert torch.equal(without, with_image)
        assert nodes(with_image).count("ConvolutionBackward0") == 8
        assert nodes(without).count("ConvolutionBackward0") == 7
        without.sum().backward()

    @pytest.mark.parametrize("name", ["bound", "full", "conv_dora r4", "bf16 autocast, channels_last"])
    def test_a_subject(self, name):
        case = cases.Case("", "", "2D U-Net", lambda: UNet(widths=(2, 4)), (1, 1, 8, 8), 1, options=True)
        chosen = {
            variant.name: variant
            for group in variants.groups(case, [4])
            for variant in (*group.references, *group.others)
        }[name]
        made = subject.build(case, chosen, torch.device("cpu"))
        assert (made.optimiser is None) == (name == "bound") == (made.trainable == 0)
        assert made.image.requires_grad == (name == "bound")
        made.step()
        assert made.image.grad is None
        made.evaluate()

    def test_memory(self):
        """A layer of 1000 weights: AdamW holds two more of each, and a gradient of its size comes and goes."""

        def build():
            net = nn.Linear(1000, 1, bias=False)
            return subject.Subject(net, torch.rand(1, 1000), False, torch.optim.AdamW(net.parameters()), "")

        _, found = memory.first_steps(build, torch.device("cpu"))
        weights, image = 4000, 4000
        assert 3 * weights + image <= found.resident < 3 * weights + image + 1000
        assert found.peak >= found.resident + weights


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions forward"),
        ("mkldnn::_convolution_pointwise", "convolutions forward"),
        ("aten::_slow_conv2d_forward", "convolutions forward"),
        ("aten::_slow_conv2d_backward", "convolutions backward"),
        ("aten::convolution_backward", "convolutions backward"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::native_batch_norm_backward", "activations, norms of the network, pooling"),
        ("aten::copy_", "copies and fills"),
        ("aten::neg_", "element-wise and sums"),
        ("AdaptedLayerBackward", "between operations"),
        ("aten::as_strided", "views and other small ones"),
    ],
)
def test_operations_of_a_profile_are_told_apart(operation, kind):
    assert profiling.kind(operation) == kind
