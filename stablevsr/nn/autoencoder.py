"""Which autoencoder a model has."""

from stablevsr.config import TemporalTinyConfig, VAEConfig
from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.nn.vae import VAE


def build_vae(config: VAEConfig | TemporalTinyConfig) -> VAE | TemporalTinyVAE:
    """The autoencoder that a configuration describes: `TemporalTinyVAE` is for streaming, `VAE` for all else."""
    return TemporalTinyVAE(config) if isinstance(config, TemporalTinyConfig) else VAE(config)
