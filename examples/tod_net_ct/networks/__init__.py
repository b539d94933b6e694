"""The networks themselves: TOD-Net's denoiser, the four task networks, the baselines, an ImageNet network.

They know the HU window and their checkpoint files, and nothing of training.
"""

from .baselines import Autoencoder, SelfAttentionDenoiser, ThreeLayerCNN, bm3d, critic_network, non_local_means
from .denoiser import Denoiser, load_denoiser, save_checkpoint, unet
from .exported import load_weights, weights_of, write_weights
from .perceptual import as_slices, perceptual_loss
from .task_networks import SIDE_MULTIPLE, TASK_NETWORKS, build, load_network, save_network

__all__ = [
    "Autoencoder",
    "Denoiser",
    "SIDE_MULTIPLE",
    "SelfAttentionDenoiser",
    "TASK_NETWORKS",
    "ThreeLayerCNN",
    "as_slices",
    "bm3d",
    "build",
    "critic_network",
    "load_denoiser",
    "load_network",
    "load_weights",
    "non_local_means",
    "perceptual_loss",
    "save_checkpoint",
    "save_network",
    "unet",
    "weights_of",
    "write_weights",
]
