"""Which networks are built because a file names them: a file of others must not decide what code runs.

A file says its network by name and arguments. What the user names (a command's `--network`, an argument from Python)
is the user's own word, and is not asked here.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from segraft.errors import SegraftError

VARIABLE = "SEGRAFT_TRUST"
"""Of the environment: packages, modules or `package.module:Class`, separated by commas, that the user vouches for."""

PACKAGES = ("segraft.networks", "monai.networks.nets", "dynamic_network_architectures")
"""Packages whose own network classes a file may name."""

REACHING_OUT = (
    "monai.networks.nets.cell_sam_wrapper",
    "monai.networks.nets.torchvision_fc",
    "monai.networks.nets.transchex",
)
"""Modules of them whose networks fetch or open files by themselves."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PLACE = re.compile(r"[/\\.:~]")


def trust(*names: str) -> None:
    """Vouch for packages, so that networks of theirs are built where files name them.

    It holds for this process and those that it starts: it is added to SEGRAFT_TRUST of the environment.

    Args:
        names: `package`, `package.module`, or `package.module:Class`, which is that class alone.

    Raises:
        SegraftError: something else.
    """
    for name in names:
        if not _PATH.fullmatch(name if ":" in name else f"{name}:Any"):
            raise SegraftError(
                f"{name!r} is no package to trust: write package, package.module or package.module:Class."
            )
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_vouched(), *names]))


def trust_asked(network: str) -> None:
    """Vouch for the class of a network that the user asked for by its path, as files may then name it too."""
    if _PATH.fullmatch(network) and not _known(network.partition(":")[0]):
        trust(network)


def is_trusted(network: str) -> bool:
    """Whether the user vouched for a network's class, its module or a package that it is in."""
    module = network.partition(":")[0]
    return any(network == name or (":" not in name and _within(module, name)) for name in _vouched())


def require_trusted(network: str, arguments: Mapping[str, Any], source: object) -> None:
    """Refuse a network that a file names, before anything of it is imported, unless it is known to run nothing else.

    Built are keys of `NETWORKS`; classes that `PACKAGES` define, with arguments that name no file or address and ask
    for no pre-trained weights; and what the user vouches for, with any arguments.

    Args:
        network: as of `build`.
        arguments: of it.
        source: the file that names it.

    Raises:
        SegraftError: saying how to vouch for it.
    """
    if ":" not in network or is_trusted(network):  # without: a key of NETWORKS, else `build` refuses it
        return
    if not _PATH.fullmatch(network):  # nothing of it is repeated as a command
        raise SegraftError(f"{source} names the network {network!r}, which is no 'package.module:Class': make it anew.")
    module, _, name = network.partition(":")
    if not _known(module) or not _defined(module, name):
        raise SegraftError(
            f"{source} names the network {network!r}, which no file may choose by itself, as its code "
            f"may do anything: if you trust both, pass --trust {package_of(network)} or set "
            f"{VARIABLE}={package_of(network)}."
        )
    inner = arguments.get("network")
    if _within(module, PACKAGES[0]) and isinstance(inner, str):  # a network of ours around another
        require_trusted(inner, _mapping(arguments.get("arguments")), source)
        arguments = {key: value for key, value in arguments.items() if key not in ("network", "arguments")}
    for key, value in _leaves({**_defaults(network), **arguments}):
        if (str(key).startswith("pretrained") and value) or (isinstance(value, str) and _PLACE.search(value)):
            raise SegraftError(
                f"{source} builds {network} with {key} {value!r}, by which it may fetch or open other files: if you "
                f"trust that, pass --trust {network} or set {VARIABLE}={network}."
            )


def package_of(network: str) -> str:
    """What to vouch for: of a package that files may name in part, no more than this class."""
    top = network.partition(":")[0].partition(".")[0]
    partly = any(_within(package, top) for package in PACKAGES)
    return network if partly else top


def _vouched() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _known(module: str) -> bool:
    return any(_within(module, package) for package in PACKAGES) and module not in REACHING_OUT


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _defined(module: str, name: str) -> bool:
    """Whether one of `PACKAGES` itself has the class; one that cannot be imported is told by `build`."""
    from importlib import import_module

    try:
        found = getattr(import_module(module), name)
    except Exception:  # noqa: BLE001  as a module may raise anything
        return True
    home = getattr(found, "__module__", "")
    return _known(home)


def _defaults(network: str) -> dict[str, Any]:
    from segraft.networks.registry import parameters_of

    try:
        return parameters_of(network)
    except (SegraftError, ValueError):
        return {}


def _leaves(values: Any, key: object = "") -> Iterator[tuple[object, Any]]:
    """Every value inside, with the last key that leads to it."""
    if isinstance(values, Mapping):
        for inner, value in values.items():
            yield from _leaves(value, inner)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, key)
    else:
        yield key, values


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
