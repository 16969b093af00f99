"""SparseLowBitAttention: sparse-linear attention on TurboWan models, training-free sparsity on stock Wan models."""

from comfy_api.latest import io

from ..turbo_core.sla import DTYPES, PRECISIONS, sparse_linear_attention
from .block_list import parse_blocks
from .blocks import OPTIONS, active_settings, has_trained_sla, log_once, wan_network
from .inputs import check_choice, check_number

OVERRIDE = "optimized_attention_override"
MODES = ("auto", "sparse only", "dense")
SELECTIONS = ("top-k", "cumulative score")
MAX_TOKENS = 1 << 20
_LAST = "turbowan_last_self_attention"  # block of the last one, in the options of one evaluation


def _is_self_attention(q, k, options, of_image):
    """Cross-attention comes through the override as well: its keys differ in number, or it follows self-attention."""
    block = options.get("block_index")
    if q.shape != k.shape:
        if not of_image:  # attention to an image prompt stands between self-attention and the text
            options.pop(_LAST, None)
        return False
    if block is not None and options.get(_LAST) == block:
        del options[_LAST]
        return False
    options[_LAST] = block
    return True


def training_free(previous):
    """An attention override for models without proj_l; `previous` is the override that was there, or None."""

    def attention(func, q, k, v, heads, *args, **kwargs):
        settings = None
        options = kwargs.get("transformer_options") or {}
        of_image = kwargs.get("low_precision_attention") is False
        plain = q.ndim == 3 and not args and kwargs.get("mask") is None
        # asked for [B, H, L, D], it is the given function's to answer; it is self-attention all the same
        if plain and _is_self_attention(q, k, options, of_image) and not kwargs.get("skip_output_reshape"):
            settings = active_settings(options, q.shape[1], q.shape[2] // heads, None)
        if settings is not None and q.dtype not in DTYPES:
            log_once(f"dense attention, because q, k and v are {q.dtype}")
            settings = None
        if settings is None:
            return (func if previous is None else lambda *a, **kw: previous(func, *a, **kw))(
                q, k, v, heads, *args, **kwargs
            )
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        given = {"precision": settings["precision"], "coverage": settings.get("coverage")}
        out = sparse_linear_attention(q, k, v, None, None, settings["topk"], **given)
        return out.flatten(2)

    return attention


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
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of key blocks each query block attends to. TurboWan was trained at 0.1, its "
                    "authors recommend 0.15; stock models want 0.3 and more.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    tooltip="bf16: SLA. int8: SageSLA, int8 scores and fp8 values. Without the Triton kernels (Turbo "
                    "Doctor tells) int8 is emulated: slower, and with more memory than bf16.",
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
        check_choice("precision", precision, PRECISIONS)
        check_choice("mode", mode, MODES)
        check_choice("selection", selection, SELECTIONS)
        trained = has_trained_sla(network)
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        model = model.clone()
        options = model.model_options["transformer_options"]
        options[OPTIONS] = {
            "mode": {"auto": "sparse-linear" if trained else "sparse", "sparse only": "sparse", "dense": "dense"}[mode],
            "topk": topk,
            "coverage": None if selection == SELECTIONS[0] else coverage,
            "precision": precision,
            "sigma_start": to_sigma(start_percent) if start_percent > 0 else None,
            "sigma_end": to_sigma(end_percent) if end_percent < 1 else None,
            "dense_blocks": parse_blocks(dense_blocks, len(network.blocks)),
            "min_tokens": min_tokens,
            "verbose": verbose,
        }
        if not trained:
            options[OVERRIDE] = training_free(options.get(OVERRIDE))
        return io.NodeOutput(model)


NODES = [SparseLowBitAttention]
