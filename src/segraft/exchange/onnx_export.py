"""A finished adapter, merged into its base, as an ONNX model that says what it segments and how scans are prepared."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segraft._version import __version__
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished
from segraft.networks.registry import size_multiple

MODEL, DESCRIPTION = "model.onnx", "model.json"
INPUT, OUTPUT = "image", "logits"
AXES = ("x", "y", "z")

EXCLUSIVE = (
    "logits, one per label in the order of labels: a voxel gets the label of the largest sigmoid if that is at least "
    "0.5, else 0"
)
OVERLAPPING = (
    "logits, one per label in the order of labels, which are regions that may overlap: a region is where its sigmoid "
    "is at least 0.5; masks are painted with the values of regions in their order, the last above the others"
)

OF_TORCH = "pkg.torch"
"""How the keys begin under which torch's exporter tells of itself: with stack traces, which hold paths."""

NEEDED = ("onnx", "onnxscript", "onnxruntime")

CURE = ": export another format."

LARGEST_DIFFERENCE = 1e-4
"""Of logits, or as a share of the largest where that is above 1."""


def export_onnx(finished: Finished, folder: Path) -> tuple[str, ...]:
    """Write `model.onnx`, and `model.json` with what stands in its metadata too.

    Any number of images goes at once. They may be of any size that the network takes where it consists of
    convolutions; else, as in networks with attention, they are of the patch's. What was written is run by onnxruntime
    and held against the network before it counts as written.

    Raises:
        SegraftError: a package is missing, torch cannot export the network, or what it exported computes otherwise.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SegraftError(f"ONNX needs {', '.join(missing)}: pip install 'segraft[onnx]'.")
    net = finished.merged().float().eval()
    patch = finished.preparation.patch
    sizes = patch[:2] if patch[2] == 1 else patch
    description = _description(finished, sizes)
    path, reason = folder / MODEL, _why_fixed(net)
    if reason is None:
        try:
            _write(net, path, sizes, any_size=True, description=description)
            _hold_against(net, path, len(finished.channels), (sizes, _other(sizes, size_multiple(net))))
        except SegraftError as error:
            reason = str(error).removesuffix(CURE)
    if reason is not None:
        _write(net, path, sizes, any_size=False, description=description)
        _hold_against(net, path, len(finished.channels), (sizes,))
    description["input"]["sizes"] = list(sizes) if reason else "any that the network takes"
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if reason is None:
        return ()
    return (f"the model takes images of {_times(sizes)} voxels alone, its patch ({reason}).",)


def _description(finished: Finished, sizes: Sequence[int]) -> dict[str, Any]:
    """What whoever runs the model needs to know."""
    axes = ", ".join(AXES[: len(sizes)])
    return {
        "segraft_version": __version__,
        "base_fingerprint": finished.header.fingerprint,
        "method": finished.header.spec.method,
        "labels": {str(value): name for value, name in finished.labels.items()},
        "regions": {str(value): list(covers) for value, covers in finished.labels.regions.items()},
        "channels": list(finished.channels),
        "preparation": finished.preparation.model_dump(mode="json"),
        "input": {"name": INPUT, "axes": f"batch, channel, {axes}", "type": "float32"},
        "output": {
            "name": OUTPUT,
            "axes": f"batch, label, {axes}",
            "meaning": EXCLUSIVE if not finished.labels.regions else OVERLAPPING,
        },
        "patches": {
            "size": list(finished.preparation.patch),
            "overlap": finished.preparation.overlap,
            "averaged": finished.preparation.average,
            "weights": finished.preparation.weights,
            "windows": finished.preparation.windows,
            "mirror_axes": list(finished.preparation.mirror_axes),
        },
    }


def _why_fixed(net: nn.Module) -> str | None:
    """Why images of other sizes than the patch would not do; None for a network of convolutions."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.LayerNorm):
            return f"{type(net).__name__} is not of convolutions alone: {name} is a {type(module).__name__}"
    return None


def _other(sizes: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Sizes that a network takes beside those of the patch; a smaller one where there is room."""
    return tuple(size - multiple if size >= 3 * multiple else size + multiple for size in sizes)


def _write(net: nn.Module, path: Path, sizes: Sequence[int], *, any_size: bool, description: Mapping[str, Any]) -> None:
    """Export the network.

    Raises:
        SegraftError: torch cannot.
    """
    free = {0: "batch", **({2 + place: AXES[place] for place in range(len(sizes))} if any_size else {})}
    channels = len(description["channels"])
    example = torch.zeros(2, channels, *sizes)  # an axis of size 1 would be taken for fixed
    try:
        with _quiet():
            program = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(free,),
                verbose=False,
            )
    except Exception as error:  # whatever a network makes the exporter stumble over
        raise SegraftError(f"torch cannot export {type(net).__name__} to ONNX ({_in_short(error)}){CURE}") from error
    assert program is not None  # noqa: S101  as dynamo was asked for
    _forget_the_maker(program.model)
    for name, value in description.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(path)


def _forget_the_maker(model: Any) -> None:
    """Take out of an onnxscript model what torch says of how it was made, which holds paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        nodes = list(graph.all_nodes())
        values = [*graph.inputs, *graph.outputs, *(value for node in nodes for value in node.outputs)]
        initializers = list(getattr(graph, "initializers", {}).values())
        for part in (graph, *nodes, *values, *initializers):
            kept = {key: value for key, value in part.metadata_props.items() if not key.startswith(OF_TORCH)}
            part.metadata_props.clear()
            part.metadata_props.update(kept)
            part.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: of packages that are not there, and of its own calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _in_short(error: BaseException) -> str:
    """The first line that says what the matter is, of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


@torch.no_grad()
def _hold_against(net: nn.Module, path: Path, channels: int, sizes: Sequence[Sequence[int]]) -> None:
    """Run the model and the network on the same images, one by one, of each size.

    Raises:
        SegraftError: onnxruntime cannot run it, or it computes otherwise.
    """
    import onnx
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is told by us
    try:
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for each in sizes:
            image = torch.rand(1, channels, *each, generator=generator)
            expected: Tensor = net(image)
            found = torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])
            _require_equal(found, expected, each)
    except SegraftError:
        raise
    except Exception as error:  # those of onnxruntime have no class of their own
        raise SegraftError(
            f"onnxruntime cannot run what torch exported of {type(net).__name__} ({_in_short(error)}){CURE}"
        ) from error


def _require_equal(found: Tensor, expected: Tensor, sizes: Sequence[int]) -> None:
    limit = LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= limit:
        raise SegraftError(
            f"what torch exported computes otherwise than the network on images of {_times(sizes)} voxels{CURE}"
        )


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))
