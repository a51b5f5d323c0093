"""Low-rank adapters for any weight of any network. Needs torch alone and knows nothing of medicine.

net = graft(net, AdapterSpec("dora_c", rank=8))
...train...
save(net, "task.safetensors")
"""

from segraft.adapters.controls import CONTROLS, Budget, Fixed, Proximal, RankControl
from segraft.adapters.counting import ParameterRow, ParameterTable, parameter_table
from segraft.adapters.files import (
    AdapterHeader,
    BaseMismatchError,
    adapter_tensors,
    fingerprint,
    load,
    read_header,
    save,
)
from segraft.adapters.formulas import FORMULAS, Formula
from segraft.adapters.gradients import DeadFactorsError, require_gradients
from segraft.adapters.graft import activate, activated, graft, has_adapters, ungraft
from segraft.adapters.merging import merge, unmerge
from segraft.adapters.rank_control import RankControlled, prune, ranks_in_use
from segraft.adapters.routing import routed
from segraft.adapters.selection import parts_of, projections_of
from segraft.adapters.spec import PRESETS, AdapterSpec, Preset

__all__ = [
    "CONTROLS",
    "FORMULAS",
    "PRESETS",
    "AdapterHeader",
    "AdapterSpec",
    "BaseMismatchError",
    "Budget",
    "DeadFactorsError",
    "Fixed",
    "Formula",
    "ParameterRow",
    "ParameterTable",
    "Preset",
    "Proximal",
    "RankControl",
    "RankControlled",
    "activate",
    "activated",
    "adapter_tensors",
    "fingerprint",
    "graft",
    "has_adapters",
    "load",
    "merge",
    "parameter_table",
    "parts_of",
    "projections_of",
    "prune",
    "ranks_in_use",
    "read_header",
    "require_gradients",
    "routed",
    "save",
    "ungraft",
    "unmerge",
]
