"""Building the autoencoder of a model."""

from stablevsr.config import TemporalTinyConfig, VAEConfig
from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.nn.vae import VAE


def build_vae(config: VAEConfig | TemporalTinyConfig) -> VAE | TemporalTinyVAE:
    """The autoencoder that a configuration describes: `TemporalTinyVAE` for streaming, else `VAE`."""
    return TemporalTinyVAE(config) if isinstance(config, TemporalTinyConfig) else VAE(config)
