"""Networks, their named parts, and base files."""

from segraft.networks.bases import Base, load_base, load_weights, read_base, save_base
from segraft.networks.multiview import MultiViewUNet
from segraft.networks.registry import NETWORKS, build
from segraft.networks.unet import UNet

__all__ = ["NETWORKS", "Base", "MultiViewUNet", "UNet", "build", "load_base", "load_weights", "read_base", "save_base"]
