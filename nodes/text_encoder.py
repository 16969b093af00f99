"""TurboTextEncoderLoader: Wan's umT5 in any size, the small one of the tiny family included."""

from comfy_api.latest import io

from .checks.red import red
from .checks.red import text_encoder as check
from .host.files import file_input, model_file
from .host.loading import load_text_encoder


class TurboTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboTextEncoderLoader",
            display_name="Turbo Text Encoder Loader",
            category="model/loaders",
            description="Loads Wan's umT5 text encoder as CLIPLoader with type wan does, and small ones such "
            "as TinyWan's, which CLIPLoader does not take.",
            search_aliases=["umt5", "TurboWan", "load clip"],
            inputs=[file_input("text_encoder", "A umT5 file in models/text_encoders.", "text_encoders")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, text_encoder=None):
        return red(check, text_encoder)

    @classmethod
    def execute(cls, text_encoder) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(model_file(text_encoder, "text_encoders")))


NODES = [TurboTextEncoderLoader]
