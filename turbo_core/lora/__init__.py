"""LoRA files on a WanModel: merged into float weights, beside int8 ones, and off again bit for bit."""

from .apply import put_on
from .library import Library
from .names import Lora, as_loras

__all__ = ["Library", "Lora", "as_loras", "put_on"]
