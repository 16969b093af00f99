"""A folder of videos with captions to training data, by the VAE and the text encoder of the model to be trained."""

from pathlib import Path

import torch

from ..errors import TurboError, missing_library
from ..pipeline import encode_image
from ..pipeline.sizes import latent_shape
from ..pipeline.text import load_text_encoder
from ..pipeline.video import VIDEO_SUFFIXES, prepare_image
from ..vae import encode_video, load_vae
from .data import Data, encode_captions


def encode(folder, vae, text_encoder, tokenizer, size, frames: int, device, image=False, log=print) -> Data:
    """Encode every video of a folder that has a .txt of the same name beside it, its caption.

    size: (width, height), to which frames are stretched; frames: 4n + 1, the first ones of each video; image:
    each video's first frame too, as an image-to-video model is given it. Raises TurboError when there is no such
    pair, or a video is too short or cannot be read.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    pairs = [(path, path.with_suffix(".txt")) for path in found if path.with_suffix(".txt").is_file()]
    if not pairs:
        raise TurboError(
            f"{folder} has {len(found)} videos ({', '.join(VIDEO_SUFFIXES)}) and no caption to any: clip.mp4 needs a "
            "clip.txt beside it."
        )
    latent_shape(*size, frames)  # checks them
    captions = ["", *(text.read_text(encoding="utf-8").strip() for _, text in pairs)]
    encoder, tokenize = load_text_encoder(text_encoder, tokenizer, device)
    text, lengths = encode_captions(encoder, tokenize, captions)
    del encoder
    codec, latents, images = load_vae(vae, device), [], []
    for path, _ in pairs:
        video = read_video(path, frames)
        clip = torch.stack([prepare_image(frame, *size) for frame in video], 1)[None]
        latents.append(encode_video(codec, clip).to("cpu", torch.bfloat16))
        if image:
            images.append(encode_image(codec, clip[0, :, 0], frames).to("cpu", torch.bfloat16))
        log(f"{path.name}: {len(latents)}/{len(pairs)}")
    captions_of = 1 + torch.arange(len(pairs))[:, None]
    return Data(torch.cat(latents), text.cpu(), lengths, captions_of, torch.cat(images) if image else None)


def read_video(path, frames: int) -> torch.Tensor:
    """The first frames of a video: uint8 [frames, 3, H, W]. Raises TurboError when there are fewer, or none."""
    try:
        import av
    except ImportError as error:
        raise missing_library("av", "Reading a video") from error
    pictures = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pictures.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(pictures) == frames:
                    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise TurboError(f"video: {path} cannot be read ({error}). Save it as MP4.") from error
    raise TurboError(
        f"video: {path} has {len(pictures)} frames, expected at least {frames}. Lower --frames, or remove it."
    )
