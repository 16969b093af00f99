"""TurboLoader: any TurboWan or Wan file as an ordinary MODEL."""

from comfy_api.latest import io

from .checks.red import model, red
from .host.files import file_input, listed_files, model_file
from .host.inputs import check_choice
from .host.loading import DTYPES, load_turbo_model
from .reports.made import states
from .reports.memory import tell_memory
from .reports.world import watch_world


class TurboLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboLoader",
            display_name="Turbo Loader",
            category="model/loaders",
            description="Loads TurboWan and Wan diffusion models as an ordinary MODEL: the published .pth (quantized "
            "or not), safetensors, Diffusers' layout, files saved by ComfyUI or by turbo-core, and stock Wan files in "
            "every format that ComfyUI's own loader reads.",
            search_aliases=["TurboDiffusion", "TurboWan", "load diffusion model", "unet loader"],
            inputs=[
                file_input("model_name", "A file in models/diffusion_models; of a model in several files, its index."),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Type of the weights that are not int8. 'default' lets ComfyUI choose for this card.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        return red(model, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name=None, **inputs):
        return states(listed_files(model_name))  # Turbo Convert and Turbo Merge may have written it anew

    @classmethod
    def execute(cls, model_name, dtype="default") -> io.NodeOutput:
        check_choice("dtype", dtype, DTYPES)
        model = load_turbo_model(model_file(model_name), DTYPES[dtype])
        return io.NodeOutput(watch_world(tell_memory(model)))


NODES = [TurboLoader]
