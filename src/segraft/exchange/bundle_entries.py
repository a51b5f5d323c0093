"""Entries of the bundles that Segraft writes, by which it knows its own again; MONAI evaluates or ignores them."""

VALUES = "label_values"
"""The value in masks of each output."""

REGIONS = "label_regions"
"""Where labels are regions: value -> the label values that it covers, in the order of painting."""

SCORES, PROBABILITIES = "scores", "$torch.nn.Sequential(@network, torch.nn.Sigmoid())"
"""What is averaged where patches overlap, the network's logits or these."""

MASK = (
    "$lambda p: torch.where(p.amax(0, keepdim=True) >= 0.5, "
    f"torch.as_tensor(@{VALUES}, device=p.device)[p.argmax(0, keepdim=True)], 0)"
)
"""From probabilities [L, X, Y, Z] to a label map [1, X, Y, Z], where labels exclude each other."""

INNER_ENTRY, HEAD_ENTRY = "base_network", "task_outputs"
SEQUENCE = f"$torch.nn.Sequential(@{INNER_ENTRY}, @{HEAD_ENTRY})"
"""A network with a 1×1 convolution on top of its outputs (`segraft.networks.outputs`)."""
