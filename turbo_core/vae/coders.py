"""What encodes pictures and what decodes videos: the VAE does both, or a fast decoder stands beside it."""

import torch

from .files import load_vae
from .tiny import load_fast


class Coders:
    """vae, fast: files; fast may be None. encodes: whether pictures are to be encoded, which only the VAE does; where
    nothing is and a fast decoder is there, the VAE is not read."""

    def __init__(self, vae, fast, encodes: bool):
        self.paths, self.encodes = (vae, fast), encodes
        self.encoder = self.decoder = None

    def load_once(self, stage, device, dtype: torch.dtype) -> None:
        """Read what is not there, within a context manager of stage(name)."""
        if self.decoder is None:
            with stage("load VAE"):
                self.load(device, dtype)

    def load(self, device, dtype: torch.dtype) -> None:
        """Read the files. Raises TurboError for files of another kind."""
        vae, fast = self.paths
        encoder = load_vae(vae, device, dtype) if fast is None or self.encodes else None
        self.decoder = encoder if fast is None else load_fast(fast, device, dtype)
        self.encoder = encoder  # both or none: where one cannot be read, the next try reads both

    def told(self) -> str | None:
        """The name of the loaded decoder where it is not the VAE's, for settings."""
        return None if self.paths[1] is None else self.decoder.told()

    def bytes(self) -> int:
        """Of the weights that are loaded."""
        networks = {id(network): network for network in (self.encoder, self.decoder) if network is not None}
        return sum(p.nbytes for network in networks.values() for p in network.parameters())

    def free(self) -> None:
        """Let go of both."""
        self.encoder = self.decoder = None
