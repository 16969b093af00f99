"""QuantizeW8A8: any Wan MODEL with int8 linears, and the linears of other models where the user names them."""

from comfy_api.latest import io

from ..turbo_core.errors import TurboError, quoted
from ..turbo_core.int8 import quantize_block, quantize_rows
from ..turbo_core.wan import QUANTIZED_LINEARS
from .host.inputs import check_choice, network_of, parse_blocks, wan_network
from .host.quantizing import matching_layers, quantize_patcher, wan_layers
from .reports.advice import of_quantizing
from .reports.memory import tell_memory
from .reports.show import report

FORMATS = {"block (TurboWan)": quantize_block, "row (ComfyUI native)": quantize_rows}
LAYERS = {
    "all": QUANTIZED_LINEARS,
    "feed-forward": ("ffn.0", "ffn.2"),
    "attention": tuple(name for name in QUANTIZED_LINEARS if "attn" in name),
}


class QuantizeW8A8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantizeW8A8",
            display_name="Quantize W8A8",
            category="model/patch",
            description="Makes the linear layers of a Wan MODEL int8, weights and activations: half the memory. LoRAs "
            "applied before are baked in; LoRAs applied after work too. Files that are int8 already need no node. "
            "Other models by their layers' names, see pattern.",
            search_aliases=["int8", "TurboWan", "quantize model"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan MODEL, with the LoRAs that are to be baked in."),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    tooltip="block: 128x128 blocks, as the published TurboWan files. row: one scale per row, which "
                    "ComfyUI can load by itself after saving; faster without a GPU.",
                ),
                io.Combo.Input("layers", options=list(LAYERS), advanced=True, tooltip="Which linear layers."),
                io.String.Input(
                    "skip_blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip='Blocks that stay as they are, for example "0, 1, 38-39".',
                ),
                io.String.Input(
                    "pattern",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Linear layers by name, in place of layers and skip_blocks and for any MODEL: "
                    '"double_blocks.*, single_blocks.*, -*mod*". A * is any text, a minus takes away again. '
                    "Nothing is known about the quality of such a model.",
                ),
            ],
            outputs=[io.Model.Output()],
            has_intermediate_output=True,  # its warning, when the host takes the node from its cache
        )

    @classmethod
    def execute(cls, model, format, layers="all", skip_blocks="", pattern="") -> io.NodeOutput:
        pattern, skip_blocks = pattern or "", skip_blocks or ""
        check_choice("format", format, FORMATS)
        check_choice("layers", layers, LAYERS)
        if pattern.strip():
            if skip_blocks.strip() or layers != "all":
                raise TurboError(
                    f"pattern {quoted(pattern)} stands in place of layers and skip_blocks: set layers to all, empty "
                    'skip_blocks, and write what to leave out into pattern, as in "blocks.*, -blocks.0.*".'
                )
            names = matching_layers(network_of(model, "QuantizeW8A8"), pattern)
        else:
            network = wan_network(model, "QuantizeW8A8", "or name its linear layers in pattern")
            names = wan_layers(network, LAYERS[layers], parse_blocks(skip_blocks, len(network.blocks)))
        said = of_quantizing(model, names)
        quantized = tell_memory(quantize_patcher(model, FORMATS[format], names))
        return io.NodeOutput(quantized, ui=report(*said) if said else None)


NODES = [QuantizeW8A8]
