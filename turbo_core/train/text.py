"""Stage 2: a small umT5 encoder whose tokens each know what the whole caption says."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..stream_safetensors import write_safetensors
from ..tiny_family import MARKER, TEXT_CONFIG, tiny_text_encoder, tiny_tokenizer
from . import clips, engine, optim

_PAD = 0


def tokenizer() -> bytes:
    """A sentencepiece model of the captions of clips.py, and of every printable character."""
    random = torch.Generator().manual_seed(0)
    scenes = clips.random_scenes(3000, random, held_out=None)
    return tiny_tokenizer([clips.caption(scene, seed) for seed, scene in enumerate(scenes)])


def train(folder, steps=1500, batch=32, lr=3e-3, seed=0, seconds=None, log=print):
    """Train the encoder and return (state dict as ComfyUI reads it, history).

    The loss asks one linear layer to tell every attribute from every token by itself, and from any wording.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5Config, UMT5EncoderModel

    proto = tokenizer()
    processor = SentencePieceProcessor(model_proto=proto, add_eos=True)
    torch.manual_seed(seed)
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets", "vocab_size")
    sizes = {name: TEXT_CONFIG[name] for name in names}
    encoder = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    start = tiny_text_encoder(proto, seed)
    encoder.load_state_dict(start, strict=False)
    counts = [len(values) for values in clips.ATTRIBUTES.values()]
    model = nn.ModuleDict({"encoder": encoder, "heads": nn.Linear(TEXT_CONFIG["d_model"], sum(counts))})
    optimizer = optim.Both(model, 0.02, lr, _is_matrix)

    def step_of(step):
        random = engine.generator(seed, step)
        scenes = clips.random_scenes(batch, random)
        wordings = torch.randint(1 << 30, (batch,), generator=random).tolist()
        captions = [clips.caption(scene, wording) for scene, wording in zip(scenes, wordings)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(processor.encode(text)) for text in captions], batch_first=True)
        mask = (ids != _PAD).long()
        hidden = model["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        answers = model["heads"](hidden).split(counts, -1)
        weight = mask / mask.sum()
        loss, right = 0.0, 1.0
        for answer, truth in zip(answers, scenes.unbind(1)):
            truth = truth[:, None].expand(ids.shape)
            loss = loss + (F.cross_entropy(answer.transpose(1, 2), truth, reduction="none") * weight).sum()
            right = right * (answer.argmax(-1) == truth)
        loss.backward()
        optimizer.step(optim.schedule(step, steps))
        return {"loss": loss.item(), "tokens that know all": (right * weight).sum().item()}

    history = engine.run(step_of, {"model": model, "optimizer": optimizer}, folder, steps, seconds, log=log)
    trained = encoder.state_dict()
    return {name: trained.get(name, tensor).contiguous() for name, tensor in start.items()}, history


def _is_matrix(name: str, tensor) -> bool:
    return ".layer." in name and tensor.ndim == 2 and "bias" not in name


def save(state: dict, path) -> Path:
    """The encoder as ComfyUI and the pipeline read it: bfloat16, with its tokenizer and its sizes inside."""
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() and n != MARKER else t for n, t in state.items()}
    metadata = {"format": "pt", "config": json.dumps({"umt5xxl_model_config": TEXT_CONFIG})}
    write_safetensors(path, state, metadata)
    return Path(path)
