"""SparseLowBitAttention: sparse-linear attention on TurboWan models, training-free sparsity on stock Wan models."""

import functools

from comfy_api.latest import io

from ..turbo_core.sla import PRECISIONS
from .host.blocks import has_trained_sla
from .host.inputs import check_choice, check_number, parse_blocks, wan_network
from .host.kernels import fitting_precision, prove_for
from .host.override import MODES, with_settings
from .host.settings import log_once
from .reports.advice import of_percents
from .reports.show import report, show

AUTO = "auto"
TRAINED_TOPK = 0.15  # what TurboWan's authors recommend
SELECTIONS = ("top-k", "cumulative score")
MAX_TOKENS = 1 << 20


class SparseLowBitAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseLowBitAttention",
            display_name="Sparse Low-Bit Attention",
            category="model/patch",
            description="How a Wan MODEL attends to itself. TurboWan files carry a trained linear branch (proj_l): "
            "there it is sparse-linear attention (SLA), as in the original. On stock Wan models it is training-free "
            "sparsity, which costs quality, the more the less is kept. ComfyUI's own sparse attention node ignores "
            "proj_l; use one or the other.",
            search_aliases=["SLA", "SageSLA", "TurboWan", "sparse attention", "topk"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan MODEL, TurboWan or stock."),
                io.Float.Input(
                    "topk",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of key blocks that each query block attends to. 0 is auto: 0.15 where the model "
                    "was trained for it, as TurboWan's authors recommend, and as many as reach coverage on stock "
                    "models. TurboWan was trained at 0.1; stock models want 0.3 and more.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AUTO, *PRECISIONS],
                    tooltip="bf16: SLA. int8: SageSLA, int8 scores and fp8 values. auto: int8 where the Triton kernels "
                    "compute (Turbo Doctor tells), else bf16. Without the kernels int8 takes as much time as bf16 on "
                    "a CPU with int8 products, more on any other, and rounds all the same.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    advanced=True,
                    tooltip="auto: with the trained linear branch where the model has one. sparse only: without it. "
                    "dense: ordinary attention, for comparison (a TurboWan model is not itself without its branch).",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling sparse attention begins; before it attention is dense.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling sparse attention ends; after it attention is dense.",
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    advanced=True,
                    tooltip='Blocks that stay dense, for example "0, 1, 38-39" or "first 2, last 1".',
                ),
                io.Int.Input(
                    "min_tokens",
                    default=0,
                    min=0,
                    max=MAX_TOKENS,
                    advanced=True,
                    tooltip="Below this many tokens attention is dense.",
                ),
                io.Boolean.Input("verbose", default=False, advanced=True, tooltip="Log once why a block is dense."),
                io.Combo.Input(
                    "selection",
                    options=list(SELECTIONS),
                    default=SELECTIONS[0],
                    optional=True,
                    advanced=True,
                    tooltip="Which key blocks are kept. top-k: the same number for every query block, as TurboWan was "
                    "trained. cumulative score: as many as reach coverage, few where attention is sharp and many "
                    "where it is spread; for stock models. topk is then not used.",
                ),
                io.Float.Input(
                    "coverage",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="With cumulative score: share of the pooled score that the kept blocks add up to. More "
                    "keeps more blocks; how many, and how much time that takes, depends on the video.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # its warning, when the host takes the node from its cache
        )

    @classmethod
    def execute(
        cls, model, topk, precision, mode="auto", start_percent=0.0, end_percent=1.0, dense_blocks="", min_tokens=0,
        verbose=False, selection=SELECTIONS[0], coverage=0.7,
    ) -> io.NodeOutput:  # fmt: skip
        network = wan_network(model, "SparseLowBitAttention")
        shares = {"topk": topk, "coverage": coverage, "start_percent": start_percent, "end_percent": end_percent}
        for name, value in shares.items():
            check_number(name, value, 0, 1)
        check_number("min_tokens", min_tokens, 0, MAX_TOKENS)
        check_choice("precision", precision, (AUTO, *PRECISIONS))
        check_choice("mode", mode, MODES)
        check_choice("selection", selection, SELECTIONS)
        if precision == AUTO:
            precision = fitting_precision(model.load_device)
        by_score = selection == SELECTIONS[1]
        if topk == 0:
            by_score = by_score or mode != "auto" or not has_trained_sla(network)
            topk = TRAINED_TOPK
        settings = {"topk": topk, "precision": precision, "min_tokens": min_tokens, "verbose": verbose}
        settings["coverage"] = coverage if by_score else None
        settings["dense_blocks"] = parse_blocks(dense_blocks, len(network.blocks))
        if verbose:
            log_once.cache_clear()  # what another workflow was told is news here
        model = with_settings(model, mode, start_percent, end_percent, functools.partial(_tell, cls), **settings)
        prove_for(model)
        said = of_percents(start_percent, end_percent)
        return io.NodeOutput(model, ui=report(*said) if said else None)


def _tell(node, text):
    log_once(text)
    show(node, text)


NODES = [SparseLowBitAttention]
