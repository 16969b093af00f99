"""A folder of videos with captions to training data, by the VAE and the text encoder of the model to be trained."""

from pathlib import Path

import torch

from ..errors import TurboError, shown
from ..pipeline import encode_image
from ..pipeline.sizes import FPS, latent_shape
from ..pipeline.text import load_text_encoder
from ..pipeline.video import MOST_PIXELS, VIDEO_SUFFIXES, opened_video, prepare_image
from ..selfcheck import prove
from ..vae import encode_video, load_vae
from .data import Data, encode_captions

_PACKETS = 64  # without a frame, for each that is there; codecs hold back a few
_LETTERS = 10_000


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
    alone = [path.name for path in found if not path.with_suffix(".txt").is_file()]
    if alone:
        log(f"left out, without a caption of the same name (.txt): {shown(', '.join(alone), 200)}")
    captions = ["", *(_caption(text) for _, text in pairs)]
    encoder, tokenize = load_text_encoder(text_encoder, tokenizer, device)
    text, lengths = encode_captions(encoder, tokenize, captions)
    del encoder
    prove(device, ("vae",))
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
    """The first frames of a video at Wan's rate, FPS, whatever its own is: uint8 [frames, 3, H, W]. Raises TurboError
    when there are fewer, or none, or they are not of one size."""
    pictures, packets, first = [], 0, None
    with opened_video(path) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise TurboError(f"video: {path} is of a codec that is not known here. Save it as MP4.")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # before memory is asked for
        for packet in container.demux(stream):
            packets += 1
            for frame in packet.decode():
                quarters = round(frame.rotation / 90)
                if abs(frame.rotation - 90 * quarters) > 1:  # it comes cut to whole degrees
                    raise TurboError(f"video: {path} is turned by {frame.rotation} degrees. Save it upright.")
                # as players show it: a phone writes what its sensor sees and how it was held
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).rot90(quarters)
                if pictures and picture.shape != pictures[0].shape:
                    sizes = " to ".join(f"{p.shape[1]} x {p.shape[0]}" for p in (pictures[0], picture))
                    raise TurboError(
                        f"video: {path} changes its size at frame {len(pictures)}, {sizes}. Expected one size: save it "
                        "again."
                    )
                at = len(pictures) / FPS if frame.time is None else frame.time
                first = at if first is None else first
                # the first one at or after each moment: of 32 a second every other one, of 8 each twice
                while len(pictures) < frames and len(pictures) <= (at - first) * FPS + 0.01:
                    pictures.append(picture)
                if len(pictures) == frames:
                    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()
            if packets > _PACKETS * (len(pictures) + 16):
                break  # it may go on for ever
    raise TurboError(
        f"video: {path} has {len(pictures)} frames at {FPS} a second, expected at least {frames}. Lower --frames, or "
        "remove it."
    )


def _caption(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_LETTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise TurboError(f"caption: {path} is not text in UTF-8 ({shown(error)}). Save it as UTF-8.") from error
    if len(text) > _LETTERS:
        raise TurboError(
            f"caption: {path} has more than {_LETTERS:,} letters. Expected a caption: umT5 reads 512 tokens."
        )
    return text.strip()
