"""TurboTextEncoderLoader: Wan's umT5 in any size, the small one of the tiny family included."""

import json

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

CONFIG = "umt5xxl_model_config"  # the host's name for sizes that differ from umT5-xxl, also in a file's metadata


def load_text_encoder(path):
    """A CLIP from a umT5 file; sizes other than umT5-xxl come from the file's own metadata."""
    sd, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
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
            description="Loads Wan's umT5 text encoder as CLIPLoader with type wan does, and small ones made by "
            "turbo-core make-tiny, which CLIPLoader does not take.",
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
        return io.NodeOutput(load_text_encoder(folder_paths.get_full_path_or_raise("text_encoders", text_encoder)))


NODES = [TurboTextEncoderLoader]
