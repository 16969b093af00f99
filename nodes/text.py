"""TurboTextEncoderLoader: umT5 of any size. TurboPrompt: a short idea as the long English prompt that Wan wants."""

import re

from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from .checks.red import red
from .checks.red import text_encoder as check
from .host.files import file_input, listed_files, model_file
from .host.inputs import MAX_SEED, check_choice, check_number, seed_input
from .host.loading import load_text_encoder
from .reports.made import states
from .reports.show import report

NONE = "as written"
CAMERA = {
    NONE: "",
    "still": "The camera does not move.",
    "moves closer": "The camera moves slowly closer and keeps the subject in the middle.",
    "follows": "The camera follows the movement at the same pace and keeps its distance.",
    "circles": "The camera circles slowly around the subject.",
    "pans": "The camera pans slowly from left to right across the scene.",
    "from above": "Seen from above, the camera glides slowly forward.",
}
LIGHT = {
    NONE: "",
    "soft daylight": "Soft, even daylight with gentle shadows.",
    "low sun": "Warm light of a low sun from the side, with long shadows.",
    "overcast": "Cool, diffuse light under an overcast sky.",
    "night": "Night, lit by a few warm lamps, with deep shadows between them.",
    "studio": "Studio light from one large source, in front of a plain dark background.",
}
STYLE = {
    NONE: "",
    "film": "Like a frame of a feature film: shallow depth of field, natural colours, fine grain.",
    "documentary": "Like a documentary: true colours, everything in focus, nothing arranged.",
    "drawn animation": "Hand-drawn animation with clean lines and flat, clear colours.",
    "rendered animation": "Rendered animation with soft materials, round forms and bright colours.",
    "oil painting": "A moving oil painting with thick, visible strokes.",
    "black and white": "Black and white, strong contrast, fine grain.",
}
ENOUGH = 40  # words of a prompt that needs no advice
TASK = (
    "Write one paragraph of 80 to 120 English words that describes a video of five seconds for a video model. Begin "
    "with the subject, then say how it looks, what it does from the first to the last moment, where it is, the light "
    "and the camera. Only what can be seen: no sounds, no feelings, no titles, no lists. Keep everything of this idea "
    "and contradict nothing of it. Answer with the paragraph alone.\n\nIdea: "
)
MAX_LENGTH = 4096
# as the host's own node Generate Text samples
SAMPLED = {"temperature": 0.7, "top_k": 64, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05}


class TurboTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboTextEncoderLoader",
            display_name="Turbo Text Encoder Loader",
            category="model/loaders",
            description="Loads Wan's umT5 text encoder as Load CLIP with type wan does, and small ones such as "
            "TinyWan's, which Load CLIP does not take.",
            search_aliases=["umt5", "TurboWan", "load clip"],
            inputs=[file_input("text_encoder", "A umT5 file in models/text_encoders.", "text_encoders")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, text_encoder=None):
        return red(check, text_encoder)

    @classmethod
    def fingerprint_inputs(cls, text_encoder=None):
        return states(listed_files(text_encoder, kind="text_encoders"))

    @classmethod
    def execute(cls, text_encoder) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(model_file(text_encoder, "text_encoders")))


class TurboPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboPrompt",
            display_name="Turbo Prompt",
            category="text",
            description="A long English prompt of a short idea, as Wan models want it. With a language model in clip "
            "it is written out; without one, what you choose here is added in whole sentences and nothing is made up.",
            search_aliases=["TurboWan", "prompt enhance", "expand prompt", "LLM", "qwen", "gemma"],
            inputs=[
                io.String.Input(
                    "idea",
                    multiline=True,
                    default="A red fox trots through fresh snow between dark firs and looks back once.",
                    tooltip="What is to be seen and how it moves, in English.",
                ),
                io.Combo.Input("camera", options=list(CAMERA), tooltip="A sentence on the camera."),
                io.Combo.Input("light", options=list(LIGHT), tooltip="A sentence on the light."),
                io.Combo.Input("style", options=list(STYLE), tooltip="A sentence on the style."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A language model that writes, such as Gemma or Qwen by ComfyUI's Load CLIP, as its node "
                    "Generate Text takes it. Wan's umT5 only reads.",
                ),
                io.Int.Input(
                    "max_length",
                    default=300,
                    min=1,
                    max=MAX_LENGTH,
                    optional=True,
                    advanced=True,
                    tooltip="Most tokens that the language model writes.",
                ),
                # one that changes after each run would have all that follows run again, also where nothing reads it
                seed_input("Of the language model: another seed, another wording.", changes=False),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="For the text of CLIP Text Encode.")],
            has_intermediate_output=True,  # the prompt, when the host takes the node from its cache
        )

    @classmethod
    def execute(cls, idea, camera=NONE, light=NONE, style=NONE, seed=0, clip=None, max_length=300) -> io.NodeOutput:
        for name, value, options in (("camera", camera, CAMERA), ("light", light, LIGHT), ("style", style, STYLE)):
            check_choice(name, value, options)
        check_number("max_length", max_length, 1, MAX_LENGTH)
        check_number("seed", seed, -(2**63), MAX_SEED)  # as samplers take them: -1 is one too
        text = in_sentences(idea or "", CAMERA[camera], LIGHT[light], STYLE[style])
        if clip is not None:
            text = text_of_model(clip, TASK + text, int(max_length), int(seed))
            return io.NodeOutput(text, ui=report(text))
        words = len(text.split())
        advice = (
            f"{words} words: the models were trained on 80 to 120. Say how it looks, what it does from first to last, "
            "where, in which light, what the camera does; or connect a language model to clip."
        )
        return io.NodeOutput(text, ui=report(text, *([advice] if words < ENOUGH else [])))


def in_sentences(idea: str, *more: str) -> str:
    """The idea, closed as a sentence, and the others behind it. Raises TurboError where there is no idea."""
    idea = " ".join(idea.split())
    if not idea:
        raise TurboError("idea is empty: write in a few English words what is to be seen and how it moves.")
    idea = idea if idea[-1] in ".!?" else f"{idea}."
    return " ".join([idea, *filter(None, more)])


def text_of_model(clip, task: str, max_length: int, seed: int) -> str:
    """What the language model answers to the task, as one paragraph. Raises TurboError for a CLIP that writes none.

    The calls are those of the host's own node Generate Text.
    """
    try:
        tokens = clip.tokenize(task, skip_template=False, min_length=1)
        written = clip.decode(clip.generate(tokens, do_sample=True, max_length=max_length, seed=seed, **SAMPLED))
    except AttributeError as error:
        if error.name != "generate":
            raise
        raise TurboError(
            f"clip is {type(error.obj).__name__}, which reads text and writes none: load a language model such as "
            "Gemma or Qwen with Load CLIP, or leave clip empty."
        ) from error
    text = re.sub(r"<think>.*?(</think>|$)", "", written, flags=re.DOTALL)
    text = " ".join(text.split()).strip("\"'` ")
    if not text:
        raise TurboError("The language model wrote nothing: raise max_length, try another seed, or leave clip empty.")
    return text


NODES = [TurboTextEncoderLoader, TurboPrompt]
