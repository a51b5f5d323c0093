"""What MONAI's transforms after the network make of its outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_entries import MASK, PROBABILITIES, SCORES
from segraft.exchange.bundle_painting import painting_of
from segraft.exchange.bundle_preparation import Unlike

LARGEST_VALUE = int(np.iinfo(np.uint16).max)
"""In a mask."""


@dataclass(frozen=True)
class Activation:
    """What a bundle's postprocessing makes of the outputs.

    Attributes:
        exclusive: one of the outputs is chosen at each voxel, the first of them for the background; None: not said.
        painted: (output, value) in the order in which masks are painted, where outputs may overlap.
        values: what values of masks become in the end, where that is another.
        notes: what Segraft does otherwise.
        unlike: what it does that Segraft does not do, so that masks would be others.
    """

    exclusive: bool | None
    painted: tuple[tuple[int, int], ...] = ()
    values: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


@dataclass
class Made:
    """What the transforms so far make of the outputs.

    Attributes:
        count: of outputs.
        activations: names of those that came.
        mask: how masks are made of them; empty as long as they are not.
        painted: as of `Activation`, as are `values` and `notes`.
    """

    count: int
    activations: set[str]
    mask: str = ""
    painted: tuple[tuple[int, int], ...] = ()
    values: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def become(self, mask: str) -> None:
        """Count how masks are made, which must not come twice."""
        before, self.mask = self.mask, self.mask or mask
        if before:
            raise Unlike(f"{mask} comes after {before}")


_COMMON = ("_target_", "keys", "allow_missing_keys", "lazy", "_desc_", "_disabled_", "_requires_", "_mode_")


class Step:
    """One transform, of which arguments are asked for.

    Args:
        given: as in the file.
        config: it stands in.
        place: of the prediction's key among its keys.
    """

    def __init__(self, given: Mapping[str, Any], config: Config, place: int) -> None:
        self._given, self._config, self._place = given, config, place

    @property
    def disabled(self) -> bool:
        """Whether it is switched off."""
        return self._config.disabled(self._given)

    def only(self, *names: str) -> None:
        """Refuse further arguments."""
        for name, value in self._given.items():
            if name not in (*names, *_COMMON):
                raise Unlike(f"{name} is {value}")

    def raw(self, name: str) -> Any:
        """As it stands; of a list with one for each key the prediction's."""
        value = self._config.followed(self._given.get(name))
        return self._of_each(value)

    def value(self, name: str, *, default: Any = None) -> Any:
        """The same with references followed and arithmetic done."""
        return self._of_each(self._config.resolve(self._given.get(name, default)))

    def whole(self, name: str) -> Any:
        """The same of an argument that is a list by itself."""
        return self._config.resolve(self._given.get(name))

    def _of_each(self, value: Any) -> Any:
        return value[self._place if self._place < len(value) else 0] if isinstance(value, list) and value else value


def _activate(made: Made, step: Step) -> None:
    made.activations |= {name for name in ("softmax", "sigmoid") if step.value(name)}
    step.only("softmax", "sigmoid", "other")
    if step.value("other") is not None:
        raise Unlike(f"other is {step.value('other')}")
    if made.mask:
        raise Unlike(f"it comes after {made.mask}")


def _discretise(made: Made, step: Step) -> None:
    threshold = step.value("threshold")
    if step.value("argmax"):
        made.become("argmax")
        if "sigmoid" in made.activations:
            raise Unlike("argmax of a sigmoid, which leaves no background")
    if threshold is not None:
        made.become("threshold")
        if "sigmoid" not in made.activations:
            raise Unlike(f"threshold is {threshold} of what no sigmoid came before")
        if threshold != 0.5:
            raise Unlike(f"threshold is {threshold}")
    step.only("argmax", "threshold", "to_onehot", "rounding")
    if step.value("rounding") is not None:
        raise Unlike(f"rounding is {step.value('rounding')}")
    if step.value("to_onehot") is not None and not made.mask:
        raise Unlike("to_onehot comes before masks are made")


def _bring_back(made: Made, step: Step) -> None:
    if step.raw("post_func") is not None:
        raise Unlike(f"post_func is {step.raw('post_func')}")
    if made.mask or step.value("nearest_interp", default=True):  # as MONAI's
        note = "here probabilities, not masks, are brought back to the scan's grid, which makes smoother borders."
        made.notes.append(note)


def _call(made: Made, step: Step) -> None:
    step.only("func", "inv_func", "track_meta", "overwrite")
    function = step.raw("func")
    if function == MASK and "sigmoid" in made.activations:
        made.become("the choice of the largest")
        return
    order = painting_of(function)
    if not order:
        raise Unlike(f"what {function} does cannot be told")
    if made.mask == "threshold":
        alike = all(0 <= each.cut < 1 and (each.cut > 0 or not each.inclusive) for each in order)
    else:
        alike = "sigmoid" in made.activations and all(each.cut == 0.5 for each in order)
        made.become("painting")
    if not alike:
        raise Unlike("it does not cut outputs off at 0.5 of a sigmoid")
    if sorted(each.output for each in order) != list(range(made.count)):
        raise Unlike("it does not paint each output once")
    require_values([each.value for each in order])
    made.mask, made.painted = "painting", tuple((each.output, each.value) for each in order)


def _map_values(made: Made, step: Step) -> None:
    step.only("orig_labels", "target_labels", "dtype")
    before, after = step.whole("orig_labels"), step.whole("target_labels")
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        raise Unlike(f"orig_labels is {before} and target_labels is {after}")
    known = {"argmax": list(range(1, made.count)), "painting": [value for _, value in made.painted]}
    known |= {"threshold": [1]} if made.count == 1 else {}
    if made.mask not in known or made.values:
        raise Unlike("it comes twice" if made.values else "it comes before there is a mask of one channel")
    become = dict(zip(before, after, strict=True))
    if become.get(0, 0) != 0:
        raise Unlike(f"the background becomes {become[0]}")
    values = {value: become.get(value, value) for value in known[made.mask]}
    require_values(list(values.values()))
    made.values = values


def _cast(made: Made, _step: Step) -> None:
    if not made.mask:
        raise Unlike("it comes before masks are made")


def _nothing(_made: Made, _step: Step) -> None:
    """Writing, and what changes types and devices alone."""


def _unknown(_made: Made, _step: Step) -> None:
    raise Unlike("it is not known")


def _leave_out(_made: Made, _step: Step) -> None:
    """Told by name."""


READERS: dict[str, Callable[[Made, Step], None]] = {
    "Activations": _activate,
    "AsDiscrete": _discretise,
    "Invert": _bring_back,
    "Lambda": _call,
    "MapLabelValue": _map_values,
    "CastToType": _cast,
    **dict.fromkeys(
        ("KeepLargestConnectedComponent", "FillHoles", "RemoveSmallObjects"),
        _leave_out,
    ),
    **dict.fromkeys(
        (
            *("SaveImage", "EnsureType", "ToTensor", "ToNumpy", "ToDevice", "ToMetaTensor", "FromMetaTensor"),
            *("DeleteItems", "SelectItems", "Identity"),
        ),
        _nothing,
    ),
}
"""MONAI's transform -> what it means for masks. To read another one, add one entry; others are named."""


def activation_of(config: Config, place: str | None, count: int) -> Activation:
    """What the transforms at a place make of the network's outputs.

    Raises:
        SegraftError: softmax and sigmoid at once.
    """
    made = Made(count, {"sigmoid"} if config.raw(SCORES) == PROBABILITIES else set())
    unlike = []
    for name, step in _steps(config, place):
        reader = READERS.get(name.removesuffix("Dict").removesuffix("d").removesuffix("D"), _unknown)
        try:
            if step.disabled:
                continue
            reader(made, step)
        except (Unlike, SegraftError, TypeError, ValueError) as error:
            unlike.append(f"{name}: {' '.join(str(error).split())}")
        if reader is _leave_out:
            made.notes.append(f"{name} of its postprocessing is left out.")
    if len(made.activations) > 1:
        raise SegraftError(
            f"{config.path} has softmax and sigmoid in its {place}: leave the one that is not meant out."
        )
    exclusive = True if made.mask == "argmax" or "softmax" in made.activations else None
    exclusive = False if exclusive is None and (made.activations or made.mask) else exclusive
    if not made.mask and not unlike:
        made.notes.append("its postprocessing does not say how masks are made: here of the largest output.")
    return Activation(exclusive, made.painted, made.values, tuple(made.notes), tuple(unlike))


def _steps(config: Config, place: str | None) -> list[tuple[str, Step]]:
    """The prediction's transforms, by name."""
    composed = config.followed(config.raw(place)) if place else None
    if isinstance(composed, Mapping):
        listed = [composed] if "transforms" not in composed else config.followed(composed["transforms"])
        listed = [] if config.disabled(composed) else listed
    else:
        listed = composed
    found = [config.followed(each) for each in (listed if isinstance(listed, list) else [listed] if listed else [])]
    keyed = [(each, _keys(each, config) if isinstance(each, Mapping) else None) for each in found]
    known = [key for _, keys in keyed for key in keys or ()]
    key = "pred" if "pred" in known or not known else known[0]
    steps = []
    for each, keys in keyed:
        if not isinstance(each, Mapping):
            steps.append((str(each), Step({}, config, 0)))
        elif keys is None or key in keys:
            name = str(each.get("_target_", "")).rpartition(".")[2]
            steps.append((name, Step(each, config, keys.index(key) if keys else 0)))
    return steps


def _keys(step: Mapping[str, Any], config: Config) -> list[Any] | None:
    """Of a transform; None where they cannot be told, as where it has none."""
    try:
        keys = config.resolve(step.get("keys"))
    except SegraftError:  # computed: then it counts
        return None
    return [keys] if isinstance(keys, str) else keys if isinstance(keys, list) else None


def require_values(values: Sequence[Any]) -> None:
    """Refuse what cannot be the values of labels in a mask.

    Raises:
        Unlike: one is no whole number from 1 to 65535, or comes twice.
    """
    wrong = [value for value in values if type(value) is not int or not 0 < value <= LARGEST_VALUE]
    if wrong:
        raise Unlike(f"the value of a label in masks is {wrong[0]}, not one of 1 to {LARGEST_VALUE}")
    if len(set(values)) != len(values):
        raise Unlike(f"two labels have one value in masks ({', '.join(map(str, values))})")
