"""What turbo-core inspect says of a file: a model, a text encoder, a VAE, a LoRA, a video."""

import os
from collections import Counter
from pathlib import Path

_OF_MODELS = "head.modulation", "condition_embedder.time_proj.weight"


def rows_of(path: Path) -> list[tuple[str, str]]:
    """[(item, finding)] of a file as what it is. Raises TurboError for what is none of these, and for damaged ones."""
    from ..checkpoint.lora_names import split_name
    from ..checkpoint.names import looks_like
    from ..checkpoint.read import open_tensors
    from ..pipeline.video import VIDEO_SUFFIXES

    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _video(path)
    if path.suffix.lower() != ".json" and os.path.isfile(path):  # Path's own raises for names that no disk takes
        file = open_tensors(path, contents=False)
        if any(name.endswith(_OF_MODELS) for name in file.tensors):  # beside which an encoder and a VAE may lie
            return _model(path)
        kind = looks_like(file.tensors) or ""
        if not kind and any(split_name(name)[1] for name in file.tensors):
            return _lora(path, file)
        parts = {" LoRA": _lora, "umT5": _text_encoder, "VAE": _vae}
        if "decoder.3.conv.0.weight" in file.tensors:
            return _tiny_decoder(path, file)
        for word, rows in parts.items():
            if word in kind:
                return rows(path, file)
    return _model(path)


def _model(path):
    from .. import checkpoint
    from ..files import human_bytes

    found = checkpoint.inspect(path)
    return [
        ("family", found.family),
        ("task", found.task),
        ("format", found.format),
        ("sparse-linear attention", "trained (proj_l)" if found.has_sla else "no proj_l"),
        ("blocks", f"{found.num_layers}, dim {found.dim}, ffn {found.ffn_dim}"),
        ("heads", f"{found.num_heads} x {found.head_dim}"),
        ("channels", f"{found.in_dim} in, {found.out_dim} out, text {found.text_dim}"),
        ("file", f"{found.container}, {found.tensors} tensors, {human_bytes(found.bytes)}"),
        *_metadata(found.metadata),
        *(("note", note) for note in found.notes),
    ]


def _text_encoder(path, file):
    from ..pipeline.text import EMBEDDED, check_encoder

    read = not any(tensor.is_meta for tensor in file.tensors.values())  # packed parts are not
    sizes = check_encoder(file.tensors, path, read)
    tokenizer = (
        "inside" if EMBEDDED in file.tensors else "not inside: give --tokenizer, or keep google/umt5-xxl beside it"
    )
    return [
        ("family", "umT5 text encoder"),
        *((name.replace("_", " "), str(size)) for name, size in sizes.items()),
        ("tokenizer", tokenizer),
        *_file(path, file),
    ]


def _vae(path, file):
    from ..vae import build_vae

    network = build_vae(file.tensors, path, "meta")
    return [("family", "VAE of Wan 2.1, for Wan 2.2 A14B too"), ("base width", str(network.dim)), *_file(path, file)]


def _tiny_decoder(path, file):
    from ..vae import load_fast

    kind = "LightTAE" if load_fast(path, "meta").takes_raw else "TAEHV"
    return [("family", f"{kind}, a tiny decoder for drafts of Wan 2.1: generate --vae-fast"), *_file(path, file)]


def _lora(path, file):
    from ..checkpoint.lora_names import in_comfyui_names, split_name, why_not
    from ..checkpoint.shapes import expected_shapes
    from ..errors import shown

    layers = [name.removesuffix(".weight") for name in expected_shapes(40, True) if not name.endswith(".bias")]
    layers += [f"blocks.{n}.cross_attn.{part}" for n in range(40) for part in ("k_img", "v_img")]
    known = in_comfyui_names(file.tensors, layers)
    parts = {stored: split_name(name) for stored, name in known.items()}
    down = {stored: layer for stored, (layer, part) in parts.items() if "_A" in part or "down" in part}
    down = {stored: layer for stored, layer in down.items() if file.tensors[stored].ndim > 1}
    ranks = Counter(file.tensors[stored].shape[0] for stored in down)
    dims = {file.tensors[stored].shape[1] for stored, layer in down.items() if layer.endswith("self_attn.q")}
    sizes = {1536: "1.3B", 3072: "5B", 5120: "14B"}
    of = ", ".join(f"dim {dim}{f', {sizes[dim]}' if dim in sizes else ''}" for dim in sorted(dims))
    blocks = {layer.split("blocks.")[1].split(".")[0] for layer, _ in parts.values() if "blocks." in layer}
    strange = why_not([name for name in file.tensors if name not in known], layers)
    rows = [
        ("family", f"LoRA for Wan{f' ({of})' if of else ''}" if known else "LoRA, for another model than Wan"),
        ("layers", f"{len({layer for layer, _ in parts.values()})} in {len(blocks)} blocks"),
        ("rank", ", ".join(f"{rank} in {count}" for rank, count in ranks.most_common()) or "none: plain differences"),
    ]
    rows += [("left out", f"{len(names)} tensors, {why}: {shown(names[0])}") for why, names in strange.items()]
    return rows + _file(path, file)


def _file(path, file):
    from ..files import human_bytes

    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values())
    stored = ", ".join(f"{kind} in {count}" for kind, count in kinds.most_common())
    size = human_bytes(path.stat().st_size)
    return [("stored as", stored), ("file", f"{file.container}, {len(file.tensors)} tensors, {size}")] + _metadata(
        file.metadata
    )


def _metadata(metadata):
    from ..errors import shown

    return [("metadata", f"{shown(key)} = {shown(value)}") for key, value in metadata.items()]


def _video(path):
    from ..errors import shown
    from ..pipeline.provenance import credentials
    from ..pipeline.video import read_made

    made, signed = read_made(path), credentials(path)
    rows = [(shown(key), shown(value, 400)) for key, value in (made or {}).items()]
    rows += [(f"content credentials: {key}", shown(value, 200)) for key, value in (signed or {}).items()]
    return rows or [("made by", "not known: no settings and no content credentials that can be read here")]
