"""Networks, their named parts, base files, and weights from elsewhere."""

from segraft.networks.bases import Base, load_base, read_base, save_base
from segraft.networks.checkpoints import Loaded, load_checkpoint, load_weights
from segraft.networks.multiview import MultiViewUNet
from segraft.networks.registry import NETWORKS, build
from segraft.networks.trusted import trust
from segraft.networks.unet import UNet

__all__ = [
    "NETWORKS",
    "Base",
    "Loaded",
    "MultiViewUNet",
    "UNet",
    "build",
    "load_base",
    "load_checkpoint",
    "load_weights",
    "read_base",
    "save_base",
    "trust",
]
