"""The classes of hostile inputs: how each is made, how many of a thousand, and which outcomes are right."""

from random import Random

from tests.hostile import archives, dumps, headers, pictures, programs, states, videos, words
from tests.hostile.cases import Case, Kind
from tests.hostile.findings import FINDINGS, finding

KINDS = {
    "pth bytes": Kind(archives.zip_bytes, 110, "fine where only weights were touched, or nothing that is read"),
    "old pth bytes": Kind(archives.legacy_bytes, 60, "fine where only weights were touched, or nothing that is read"),
    "safetensors bytes": Kind(archives.header_bytes, 80, "fine where only weights or metadata were touched"),
    "zip structure": Kind(archives.archive, 100, "fine for honest repacks and fields that nothing depends on"),
    "pickle programs": Kind(programs.program, 130, "always an error: no program is a model"),
    "pickle payloads": Kind(programs.payload, 80, "always an error: they name code"),
    "pickles with more": Kind(programs.aside, 60, "fine where what lies beside the weights is harmless, and small"),
    "safetensors header": Kind(headers.header, 80, "fine where the safetensors library reads the same"),
    "safetensors metadata": Kind(headers.metadata, 40, "fine where the metadata say nothing of the weights"),
    "model states": Kind(states.model, 70, "fine where it still is a model; never converted with NaN or infinity"),
    "merges": Kind(states.merge, 20, "fine where the three still fit together"),
    "text encoders": Kind(states.encoder, 20, "fine where only weights or what is not read was touched"),
    "tokenizers": Kind(states.tokenizer, 20, "fine where the library reads it and it encodes"),
    "VAEs": Kind(states.vae, 20, "fine where only weights were touched"),
    "pictures": Kind(pictures.picture, 60, "fine where the library reads it; other formats and bombs never"),
    "LoRA names": Kind(words.lora, 20, "fine where some name is a layer's; names of any length take bounded time"),
    "commands": Kind(words.command, 30, "fine where the arguments make sense, however odd"),
    "training data": Kind(states.training, 20, "fine where shapes and numbers still fit together"),
    "training checkpoints": Kind(dumps.checkpoint, 30, "fine where parts and history still fit together"),
    "indexes and shards": Kind(dumps.sharded, 40, "fine where the shards are still those that the index names"),
    "videos": Kind(videos.video, 40, "fine where FFmpeg reads five frames of one size"),
    "lists of jobs": Kind(videos.jobs, 40, "fine where every line is a job; a line that is none is told"),
    "findings": Kind(finding, 20, "as each is listed in findings.py"),
}


def made(kind: str, seed: int) -> Case:
    """The input of a class and a seed, or the finding of a name; the same on every machine."""
    if kind in FINDINGS:
        return FINDINGS[kind][0]()
    return KINDS[kind].make(Random(f"{kind} {seed}"))


def planned(count: int, first: int = 0) -> list[tuple[str, int]]:
    """(class, seed) of so many inputs, by the shares of the classes."""
    whole = sum(kind.share for kind in KINDS.values())
    return [
        (name, seed)
        for name, kind in KINDS.items()
        for seed in range(first, first + max(1, count * kind.share // whole))
    ]
