"""Stage 2: a small umT5 encoder whose tokens each know what the whole caption says."""

import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint.write import write_safetensors
from ..errors import missing_library
from ..pipeline.text import PAD
from ..pipeline.umt5 import UMT5
from ..train import engine, optim
from . import world

TEXT_CONFIG = {  # ComfyUI's umt5xxl_model_config with small numbers; text_dim of the small DiTs is d_model
    "d_ff": 160,
    "d_kv": 16,
    "d_model": 64,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "umt5",
    "num_heads": 4,
    "num_layers": 2,
    "relative_attention_num_buckets": 32,
    "vocab_size": 640,
}
_LETTERS = " ".join(map(chr, range(33, 127)))
# ComfyUI recognizes the kind of a T5 file by the shape of this tensor of the full model; nothing reads its values.
MARKER = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


def train(folder, steps=1500, batch=32, muon_lr=5e-3, lr=1e-3, seed=0, seconds=None, log=print):
    """Train the encoder and return (state dict as ComfyUI reads it, history).

    The loss asks one linear layer to tell every attribute from every token by itself, and from any wording.
    """
    from sentencepiece import SentencePieceProcessor

    proto = tokenizer()
    processor = SentencePieceProcessor(model_proto=proto, add_eos=True)
    torch.manual_seed(seed)
    names = {"vocabulary": "vocab_size", "width": "d_model", "ffn": "d_ff", "blocks": "num_layers"}
    names |= {"heads": "num_heads", "head": "d_kv"}
    encoder = UMT5(**{ours: TEXT_CONFIG[theirs] for ours, theirs in names.items()})
    start = tiny_text_encoder(proto, seed)
    encoder.load_state_dict(start, strict=False)
    counts = [len(values) for values in world.ATTRIBUTES.values()]
    model = nn.ModuleDict({"encoder": encoder, "heads": nn.Linear(TEXT_CONFIG["d_model"], sum(counts))})
    optimizer = optim.Both(model, muon_lr, lr, _is_matrix)

    def step_of(step):
        random = engine.generator(seed, step)
        scenes = world.random_scenes(batch, random)
        wordings = torch.randint(1 << 30, (batch,), generator=random).tolist()
        captions = [world.caption(scene, wording) for scene, wording in zip(scenes, wordings)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(processor.encode(text)) for text in captions], batch_first=True)
        mask = ids != PAD
        hidden = model["encoder"](ids, mask)
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


def tiny_text_encoder(tokenizer: bytes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a small umT5 encoder under Hugging Face's names, float32, with its tokenizer and marker."""
    generator = torch.Generator().manual_seed(seed)
    width, ffn = TEXT_CONFIG["d_model"], TEXT_CONFIG["d_ff"]
    inner = TEXT_CONFIG["d_kv"] * TEXT_CONFIG["num_heads"]

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    state = {"shared.weight": normal(TEXT_CONFIG["vocab_size"], width, std=1.0)}
    for index in range(TEXT_CONFIG["num_layers"]):
        block = f"encoder.block.{index}.layer"
        state |= {
            f"{block}.0.layer_norm.weight": torch.ones(width),
            f"{block}.0.SelfAttention.q.weight": normal(inner, width, std=(width * TEXT_CONFIG["d_kv"]) ** -0.5),
            f"{block}.0.SelfAttention.k.weight": normal(inner, width, std=width**-0.5),
            f"{block}.0.SelfAttention.v.weight": normal(inner, width, std=width**-0.5),
            f"{block}.0.SelfAttention.o.weight": normal(width, inner, std=inner**-0.5),
            f"{block}.0.SelfAttention.relative_attention_bias.weight": normal(
                TEXT_CONFIG["relative_attention_num_buckets"], TEXT_CONFIG["num_heads"], std=0.5
            ),
            f"{block}.1.layer_norm.weight": torch.ones(width),
            f"{block}.1.DenseReluDense.wi_0.weight": normal(ffn, width, std=width**-0.5),
            f"{block}.1.DenseReluDense.wi_1.weight": normal(ffn, width, std=width**-0.5),
            f"{block}.1.DenseReluDense.wo.weight": normal(width, ffn, std=ffn**-0.5),
        }
    state["encoder.final_layer_norm.weight"] = torch.ones(width)
    state[MARKER] = torch.zeros(10240, 1)
    state["spiece_model"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    return state


def tokenizer() -> bytes:
    """The sentencepiece model of TinyWan's captions."""
    random = torch.Generator().manual_seed(0)
    scenes = world.random_scenes(3000, random, held_out=None)
    return train_tokenizer([world.caption(scene, seed) for seed, scene in enumerate(scenes)])


def train_tokenizer(sentences: list[str]) -> bytes:
    """A sentencepiece model of sentences and of every printable character; unknown ones fall back to bytes."""
    try:
        import sentencepiece
    except ImportError as error:
        raise missing_library("sentencepiece", "Making a tokenizer") from error
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, _LETTERS]),
        model_writer=model,
        vocab_size=TEXT_CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
