"""TurboTextEncoderLoader: Wan's umT5 in any size, the small one of the tiny family included."""

import json

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..turbo_core.checkpoint.names import looks_like
from ..turbo_core.errors import TurboError
from .host.inputs import model_file, read_tensors

CONFIG = "umt5xxl_model_config"  # the host's name for sizes that differ from umT5-xxl, also in a file's metadata
# what sets umT5 apart from other T5 files, and the tokenizer, which the host takes from the file as well
_OF_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "spiece_model"


def load_text_encoder(path):
    """A CLIP from a umT5 file; sizes other than umT5-xxl come from the file's own metadata."""
    sd, metadata = read_tensors(path)
    missing = [name for name in _OF_UMT5 if name not in sd]
    if missing:  # the host would take it for another kind, and start that with random weights
        kind = looks_like(sd) or "something else"
        kind = "umT5 in another layout" if "umT5" in kind else kind
        raise TurboError(
            f"{path} is not a umT5 encoder as ComfyUI has them ({missing[0]} is missing), it is {kind}. Use ComfyUI's "
            "repack, umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors."
        )
    config = json.loads((metadata or {}).get("config", "{}")).get(CONFIG)
    return comfy.sd.load_text_encoder_state_dicts(
        [sd],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.WAN,
        model_options={} if config is None else {CONFIG: config},
    )


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
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=folder_paths.get_filename_list("text_encoders"),
                    tooltip="A umT5 file in models/text_encoders.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, text_encoder) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(model_file("text_encoders", text_encoder)))


NODES = [TurboTextEncoderLoader]
