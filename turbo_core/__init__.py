"""TurboWan without ComfyUI: few-step sampling, sparse-linear attention and W8A8 linears for Wan video models."""

__version__ = "0.1.0"
