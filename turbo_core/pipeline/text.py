"""The umT5 text encoder of Wan: prompts to [B, 512, text_dim] embeddings."""

import html
import os
import re
from pathlib import Path

import torch

from ..checkpoint.formats import check_scale_names, check_scale_values
from ..checkpoint.read import open_tensors
from ..errors import TurboError, missing_library, shown
from ..files import counted
from .umt5 import UMT5, RowsOfFile

TEXT_LENGTH = 512  # tokens the DiT was trained with; shorter prompts are padded with zeros
PAD, _EOS = 0, 1
TOKENIZERS = ("spiece.model", "tokenizer.json")  # in a folder; the first that is there
TABLE = "shared.weight"
_SCALES = "scale_weight", "weight_scale", "weight_scale_inv"  # of a float8 weight, by which it is multiplied
_SCALE_NAMES = re.compile(rf"\.(?:{'|'.join(_SCALES)})$")
EMBEDDED = "spiece_model"  # ComfyUI's repacks carry the sentencepiece model as a uint8 tensor
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OFFICIAL_BLOCK_NAMES = {  # Wan-AI's name of a block's tensor -> Hugging Face's
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def clean_prompt(text: str) -> str:
    """The prompt as the reference tokenizes it: mojibake mended (if ftfy is installed), HTML unescaped, one-spaced."""
    try:
        from ftfy import fix_text
    except ImportError:  # it only repairs wrongly decoded text; a prompt typed by a person comes out the same
        pass
    else:
        text = fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def load_text_encoder(path, tokenizer=None, device="cpu", dtype=torch.bfloat16, progress=None):
    """(model, tokenize) of a umT5 encoder file in Wan-AI's, ComfyUI's or Hugging Face's naming.

    All sizes come from the tensors. tokenizer: a spiece.model, a tokenizer.json, or a folder with either; default is
    the model inside the file, then google/umt5-xxl beside it. tokenize(text) -> list of ids ending in the end token.
    float8 files (plain or scaled) are widened to dtype. progress: callable (bytes done, total). Raises
    TurboError for anything else; never downloads.
    """
    file = open_tensors(path)
    state = file.tensors
    embedded = state.pop(EMBEDDED, None)
    embedded = None if embedded is None else file.disk.read(embedded)
    state = _canonical(state, path)
    tokenize = _load_tokenizer(embedded, tokenizer, Path(path))
    sizes = _infer_sizes(state, path)
    tokenize = _within(tokenize, sizes["vocabulary"], path)
    with torch.device("meta"):
        model = UMT5(**sizes)
    expected = model.state_dict()
    for name, like in expected.items():
        _check_shape(state, name, like.shape, path)
    if state[TABLE].dtype not in _FLOAT8:  # of the largest tensor a prompt needs few rows
        model.shared = RowsOfFile(_floats(state, TABLE, path), file.disk.read)
        del expected[TABLE]
    wanted = {name: state[name] for name in expected}
    read = file.disk.reader(wanted.values(), device) or (lambda tensor: tensor)
    counting = counted(wanted.items(), progress)
    tensors = {name: _widened(state, name, path, device, read).to(device, dtype) for name, _ in counting}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False), tokenize


def check_encoder(state: dict, path, contents: bool = True) -> dict[str, int]:
    """The sizes of a umT5 encoder in Hugging Face's naming, as UMT5 takes them; no weight is read.

    Raises TurboError unless every weight, its scale and a tokenizer are there in shapes and types that fit together.
    What a layer has in a format of ComfyUI's own, which names itself beside it, is left to its reader. contents False:
    names, shapes and types alone, without reading scales or the tokenizer.
    """
    state = dict(state)
    embedded = state.pop(EMBEDDED, None)
    state = _canonical(state, path)
    sizes = _infer_sizes(state, path)
    with torch.device("meta"):
        expected = UMT5(**sizes).state_dict()
    for name, like in expected.items():
        if f"{name.removesuffix('.weight')}.comfy_quant" in state:
            continue
        _check_shape(state, name, like.shape, path)
        _floats(state, name, path)
        if contents and (scale := _scale_of(state, name)) is not None:
            check_scale_values(f"the scale of {name}", scale, path)
    if contents and embedded is not None:
        _load_tokenizer(embedded, None, Path(path))
    return sizes


@torch.inference_mode()
def encode_text(model, tokenize, prompts: list[str], length: int = TEXT_LENGTH) -> torch.Tensor:
    """Embeddings [B, length, text_dim] in the model's dtype; rows after a prompt's own tokens are zero.

    Prompts are cleaned; one longer than length - 1 tokens is cut and still ends in the end token.
    """
    tokens = [tokenize(clean_prompt(prompt)) for prompt in prompts]
    tokens = [ids if len(ids) <= length else ids[: length - 1] + ids[-1:] for ids in tokens]
    # masked keys weigh exactly zero, so the padding up to `length` need not pass through the network
    longest = max(len(ids) for ids in tokens)
    ids = torch.full((len(tokens), longest), PAD)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(tokens):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    hidden = model(ids, mask)
    hidden = hidden * mask.unsqueeze(-1).to(hidden)
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - longest))


def _canonical(state: dict, path) -> dict:
    """The state dict under Hugging Face's names."""
    if "token_embedding.weight" in state:
        state = {_huggingface_name(key): value for key, value in state.items()}
    if TABLE in state and "encoder.block.0.layer.0.SelfAttention.q.weight" in state:
        check_scale_names({_SCALE_NAMES.sub(".weight_scale", name): tensor for name, tensor in state.items()}, path)
        return state
    raise TurboError(
        f"text encoder: {path} is not a umT5 encoder. TurboWan needs models_t5_umt5-xxl-enc-bf16.pth from Wan-AI or "
        "umt5_xxl_*.safetensors from Comfy-Org (CLIP, t5xxl and llama files will not do)."
    )


def _huggingface_name(key: str) -> str:
    if key == "token_embedding.weight":
        return TABLE
    if key == "norm.weight":
        return "encoder.final_layer_norm.weight"
    match = re.fullmatch(rf"blocks\.(\d+)\.(.+)\.(weight|{'|'.join(_SCALES)})", key)
    if match and match[2] in OFFICIAL_BLOCK_NAMES:
        return f"encoder.block.{match[1]}.{OFFICIAL_BLOCK_NAMES[match[2]]}.{match[3]}"
    return key


def _infer_sizes(state: dict, path) -> dict:
    block = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
    found = (re.match(r"encoder\.block\.(\d{1,4})\.layer\.0\.", key) for key in state)
    numbers = sorted({int(match[1]) for match in found if match})
    if numbers != list(range(len(numbers))):
        raise TurboError(f"text encoder: {path} has blocks {numbers}, some between are missing. Download it again.")
    last = block.format(numbers[-1], "relative_attention_bias")
    if last not in state:
        raise TurboError(
            f"text encoder: {path} is a T5 encoder, not umT5: only its first block has position biases. "
            "Use models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors."
        )
    ffn = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    query = state[block.format(0, "q")]
    if ffn not in state:
        raise TurboError(f"text encoder: {path} lacks {ffn}. Download it again.")
    for name in (last, TABLE, ffn, block.format(0, "q")):
        if state[name].ndim != 2 or 0 in state[name].shape:
            raise TurboError(f"text encoder: {path}: {name} is {list(state[name].shape)}, expected a matrix.")
    heads = state[last].shape[1]
    vocabulary, width = state[TABLE].shape
    return {
        "vocabulary": vocabulary,
        "width": width,
        "ffn": state[ffn].shape[0],
        "blocks": len(numbers),
        "heads": heads,
        "head": query.shape[0] // heads,
    }


def _check_shape(state: dict, name: str, shape, path) -> None:
    """Raise TurboError unless a weight and its scale, where it has one, are there in the shapes that they must have."""
    if name not in state:
        raise TurboError(f"text encoder: {path} lacks {name}. Download it again.")
    got, scale = state[name].shape, _scale_of(state, name)
    if got != shape:
        raise TurboError(f"text encoder: {path}: {name} is {list(got)}, expected {list(shape)}. Download it again.")
    if scale is not None and scale.numel() != 1 and tuple(scale.shape) not in ((shape[0],), (shape[0], 1)):
        raise TurboError(
            f"text encoder: {path}: the scale of {name} is {list(scale.shape)}, expected one number or one for each of "
            f"{shape[0]} rows. Use a bf16 file."
        )


def _scale_of(state: dict, name: str):
    stem = name.removesuffix(".weight")
    return next((state[scale] for kind in _SCALES if (scale := f"{stem}.{kind}") in state), None)


def _floats(state: dict, name: str, path) -> torch.Tensor:
    weight = state[name]
    if not weight.is_floating_point():
        raise TurboError(f"text encoder: {path}: {name} is {weight.dtype}, expected floats. Use a bf16 file.")
    return weight


def _widened(state: dict, name: str, path, device, read) -> torch.Tensor:
    """One weight as floats; float8 repacks keep a scale beside it, and cross to a card before they are widened."""
    weight = read(_floats(state, name, path))
    if weight.dtype not in _FLOAT8 or torch.device(device).type == "meta":  # of which the size is wanted alone
        return weight
    if torch.device(device).type == "cuda":
        weight = weight.to(device)
    weight, scale = weight.float(), _scale_of(state, name)
    if scale is None:
        return weight
    scale = read(scale)
    check_scale_values(f"the scale of {name}", scale, path)
    return weight * scale.to(weight.device, torch.float32).reshape(-1, 1)


def _within(tokenize, vocabulary: int, path):
    """tokenize, with an error where it fails or knows tokens that the encoder does not: a damaged file may load."""

    def checked(text):
        try:
            ids = tokenize(text)
        except Exception as error:  # as raised by two libraries, bare Exception among them
            raise TurboError(f"tokenizer: that of {path} fails ({shown(error)}). Download it again.") from error
        if not ids or max(ids) >= vocabulary:
            most = max(ids, default=None)
            raise TurboError(f"tokenizer: token {most}, expected below {vocabulary}, as {path} has. Use its own.")
        return ids

    return checked


def tokenizer_place(tokenizer, path) -> Path:
    """Where a tokenizer is looked for that is not within the encoder file `path`: the path given, else beside it."""
    return Path(tokenizer) if tokenizer is not None else Path(path).parent / "google" / "umt5-xxl"


def _load_tokenizer(embedded, tokenizer, path: Path):
    if tokenizer is None and embedded is not None:
        if embedded.dtype != torch.uint8:
            raise TurboError(f"tokenizer: the {EMBEDDED} in {path} is {embedded.dtype}, expected bytes.")
        return _sentencepiece(embedded.numpy().tobytes(), path)
    place = tokenizer_place(tokenizer, path)
    found = [place] if os.path.isfile(place) else [place / name for name in TOKENIZERS]
    found = [file for file in found if os.path.isfile(file)]
    if not found:
        inside = "" if tokenizer is not None else f"{path.name} carries no tokenizer, and "
        raise TurboError(
            f"tokenizer: {inside}{place} holds no spiece.model or tokenizer.json. Pass --tokenizer with the "
            "google/umt5-xxl folder of the Wan-AI download, or use ComfyUI's umt5_xxl_*.safetensors, which has its own."
        )
    if found[0].suffix == ".json":
        return _tokenizer_json(found[0])
    return _sentencepiece(found[0].read_bytes(), found[0])


def _sentencepiece(proto: bytes, source: Path):
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise missing_library("sentencepiece", "The tokenizer") from error
    try:
        if not proto:  # which the library takes, and fails when it is used
            raise RuntimeError("empty")
        processor = SentencePieceProcessor(model_proto=proto, add_eos=True)
    except (RuntimeError, ValueError) as error:  # of its structure, and of text in it that is none
        raise TurboError(f"tokenizer: the sentencepiece model in {source} is damaged. Download it again.") from error
    return lambda text: list(processor.encode(text))


def _tokenizer_json(file: Path):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise missing_library("tokenizers", "The tokenizer") from error
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises bare Exception for every malformed file
        raise TurboError(f"tokenizer: {file} is not a tokenizer.json ({shown(error)}). Download it again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    return lambda text: [*tokenizer.encode(text, add_special_tokens=False).ids, _EOS]
