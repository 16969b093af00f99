"""TurboSize: width, height and number of frames that the models were trained for."""

import math

from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from ..turbo_core.pipeline.sizes import FPS, PRESETS, adaptive_size
from .host.inputs import check_choice, check_number

MAX_SECONDS = 60.0
MAX_ASPECT = 4  # beyond it nothing was trained, and a strip of an image asks for a latent of any length


def frames_of(seconds: float) -> int:
    """4n + 1 frames nearest to this time at 16 frames a second."""
    return 4 * math.floor(seconds * FPS / 4 + 0.5) + 1


class TurboSize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboSize",
            display_name="Turbo Size",
            category="model/latent",
            description="The sizes TurboWan models were trained for, or the size that suits an image, and the number "
            "of frames for a time at 16 frames a second.",
            search_aliases=["TurboWan", "resolution", "aspect ratio", "480p", "720p", "video length"],
            inputs=[
                io.Combo.Input("resolution", options=list(PRESETS), tooltip="What the model's name says: 480P, 720P."),
                io.Combo.Input(
                    "aspect_ratio", options=list(PRESETS["480p"]), default="16:9", tooltip="Width to height."
                ),
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=0.0,
                    max=MAX_SECONDS,
                    step=0.25,
                    tooltip="At 16 frames a second, rounded to 4n + 1 frames: 5 gives 81, which the models know best; "
                    "0 gives one picture.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Keep the aspect ratio of this image, at the area of the size chosen above; sides are "
                    "multiples of 16.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="In pixels, a multiple of 16."),
                io.Int.Output(display_name="height", tooltip="In pixels, a multiple of 16."),
                io.Int.Output(display_name="length", tooltip="Number of frames, 4n + 1."),
            ],
        )

    @classmethod
    def execute(cls, resolution, aspect_ratio, seconds, image=None) -> io.NodeOutput:
        check_choice("resolution", resolution, PRESETS)
        check_choice("aspect_ratio", aspect_ratio, PRESETS[resolution])
        check_number("seconds", seconds, 0, MAX_SECONDS)
        width, height = PRESETS[resolution][aspect_ratio]
        if image is not None:
            if image.ndim != 4 or 0 in image.shape:
                raise TurboError(
                    f"image must be [batch, height, width, channels], none of them 0, got {list(image.shape)}: "
                    "connect a picture, from Load Image for example."
                )
            height_of, width_of = image.shape[1:3]
            if max(height_of, width_of) > MAX_ASPECT * min(height_of, width_of):
                raise TurboError(
                    f"TurboSize: an image of {width_of}x{height_of} is longer than {MAX_ASPECT} to 1, and no Wan model "
                    "was made for that: crop it first."
                )
            width, height = adaptive_size(width_of, height_of, width, height)
        return io.NodeOutput(width, height, frames_of(seconds))


NODES = [TurboSize]
