"""Tiny random vision-language models with working processors: no network, no torchvision.

Images go through transformers' PIL classes. The processors of Qwen-VL and SmolVLM take a video processor too, which
needs torchvision; here they are subclasses without one, registered with `AutoProcessor` when this file is imported.
So `Idefics3`, `Gemma3` and `Llava` folders can be loaded by any process, the others by one that has imported this.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3", "llava")
UNIT = 8  # pixels on a side that become one image token, in all families: a patch of 4, two by two merged; LLaVA's is 8

QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"row_{row}_col_{col}": f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)},
}
GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
MARKS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QWEN),
    **dict.fromkeys(("smolvlm", "idefics3"), IDEFICS),
    "gemma3": GEMMA,
    "llava": {"image_token": "<image>"},
}
PLACEHOLDERS = {  # what a template writes for an image, which the processor then lengthens
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"),
    **dict.fromkeys(("smolvlm", "idefics3", "llava"), "<image>"),
    "gemma3": "<start_of_image>",
}
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- 'PLACEHOLDER' }}{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


class Qwen2VLImagesProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class Qwen25VLImagesProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class Qwen3VLImagesProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class SmolVLMImagesProcessor(SmolVLMProcessor):
    """SmolVLM's processor without videos, whose frames it counts in words (num2words)."""

    video_processor = SimpleNamespace(num_frames=1, fps=1)  # read by its `apply_chat_template`

    def __init__(self, image_processor=None, tokenizer=None, image_seq_len=4, chat_template=None, **kwargs):
        processing_smolvlm.num2words = processing_smolvlm.num2words or str
        super().__init__(image_processor, tokenizer, None, image_seq_len=image_seq_len, chat_template=chat_template)


AutoProcessor.register(Qwen2VLConfig, Qwen2VLImagesProcessor, exist_ok=True)
AutoProcessor.register(Qwen2_5_VLConfig, Qwen25VLImagesProcessor, exist_ok=True)
AutoProcessor.register(Qwen3VLConfig, Qwen3VLImagesProcessor, exist_ok=True)
AutoProcessor.register(SmolVLMConfig, SmolVLMImagesProcessor, exist_ok=True)


def vision_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per byte, after the marks for padding, end, chat and images: about 270 tokens, padded on the left."""
    marks = ["<pad>", "<|im_end|>", "<|im_start|>", *MARKS[family].values()]
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=MARKS[family],
        chat_template=TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[family]),
    )


def tokens_per_image(resolution: int) -> int:
    """Image tokens of one square picture, all marks around them left out."""
    return (resolution // UNIT) ** 2


def vision_processor(family: str, resolution: int = 16) -> Any:
    """
    A processor that scales each image to `resolution` pixels.

    Args:
        family (`str`):
            One of `FAMILIES`.
        resolution (`int`):
            Side in pixels, a multiple of 8, of the square that the model sees; with Qwen the largest one. 16 gives 4
            tokens per image, 32 gives 16. A model of Qwen, Idefics3 or SmolVLM that was made for at least this
            resolution takes it; Gemma 3 and LLaVA want the very same.
    """
    tokenizer = vision_tokenizer(family)
    template = tokenizer.chat_template
    square, count = {"height": resolution, "width": resolution}, tokens_per_image(resolution)
    if family.startswith("qwen"):
        images = Qwen2VLImageProcessorPil(min_pixels=UNIT**2, max_pixels=resolution**2, patch_size=4, merge_size=2)
        classes = {"qwen2_vl": Qwen2VLImagesProcessor, "qwen2_5_vl": Qwen25VLImagesProcessor}
        processor = classes.get(family, Qwen3VLImagesProcessor)(images, tokenizer, chat_template=template)
    elif family in ("idefics3", "smolvlm"):
        smol = family == "smolvlm"
        edge = {"longest_edge": resolution}
        image_class = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
        images = image_class(size=edge, max_image_size=edge, do_image_splitting=False)
        processor_class = SmolVLMImagesProcessor if smol else Idefics3Processor
        processor = processor_class(images, tokenizer, image_seq_len=count, chat_template=template)
    elif family == "gemma3":
        images = Gemma3ImageProcessorPil(size=square)
        processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=count)
    else:
        images = CLIPImageProcessorPil(size={"shortest_edge": resolution}, crop_size=square)
        processor = LlavaProcessor(
            images,
            tokenizer,
            patch_size=UNIT,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    return processor


def vision_model(
    family: str, seed: int = 0, *, resolution: int = 16, hidden_size: int = 16, layers: int = 2, spread: float = 0.3
) -> Any:
    """
    A random model in fp32 whose logits depend on the image.

    Args:
        family (`str`):
            One of `FAMILIES`.
        seed (`int`):
            Of the weights.
        resolution (`int`):
            Side in pixels of the images it is made for.
        hidden_size (`int`):
            Width of text model and vision tower, a multiple of 8. 16 gives 15,000 to 35,000 parameters.
        layers (`int`):
            Of each, at least 2.
        spread (`float`):
            Standard deviation of weights in the text model; large, so that a KL is not zero by accident.
    """
    tokenizer = vision_tokenizer(family)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 8,
        "num_key_value_heads": hidden_size // 8,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": spread,
    }
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(_configuration(family, text, tokenizer, resolution))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and any(part in name for part in ("vision", "visual", "projector", "connector")):
            parameter.data.normal_(
                std=2.0 / parameter[0].numel() ** 0.5
            )  # transformers' own would hardly pass the image
    return model.eval()


def vision_pair(family: str, seed: int = 0, *, resolution: int = 16, **model: Any) -> tuple[Any, Any]:
    """Model and processor of one family, made for the same resolution; `model` goes to [`vision_model`]."""
    return vision_model(family, seed, resolution=resolution, **model), vision_processor(family, resolution)


def picture(seed: int = 0, side: int = 28) -> Image.Image:
    """A square picture of blocks of colour, four on a side; another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def _configuration(family: str, text: dict[str, Any], tokenizer: Any, resolution: int) -> Any:
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS[family].items()}
    width, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_channels": 3}
    tower |= {"num_hidden_layers": layers, "num_attention_heads": heads, "image_size": resolution, "patch_size": 4}
    if family.startswith("qwen"):
        return _qwen(family, text, {f"{name}_id": i for name, i in ids.items()})
    if family in ("idefics3", "smolvlm"):
        config_class = SmolVLMConfig if family == "smolvlm" else Idefics3Config
        llama = {"model_type": "llama", **text}
        return config_class(text_config=llama, vision_config=tower, image_token_id=ids["image_token"], scale_factor=2)
    if family == "gemma3":
        special = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "layer_types": None}
        special["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
        return Gemma3Config(
            text_config={**text, **special},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
            mm_tokens_per_image=tokens_per_image(resolution),
            boi_token_index=ids["boi_token"],
            eoi_token_index=ids["eoi_token"],
            image_token_index=ids["image_token"],
        )
    return LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config=CLIPVisionConfig(**{**tower, "patch_size": UNIT, "projection_dim": width}),
        image_token_index=ids["image_token"],
        image_seq_length=tokens_per_image(resolution),
    )


def _qwen(family: str, text: dict[str, Any], ids: dict[str, int]) -> Any:
    width, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}  # of a head's 8 dimensions
    text = {**text, "rope_parameters": sections}
    tower: dict[str, Any] = {"depth": layers, "num_heads": heads, "patch_size": 4, "spatial_merge_size": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": width, "hidden_size": width, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=tower, **ids)
    tower |= {"hidden_size": width, "intermediate_size": 2 * width, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        tower |= {"window_size": 2 * UNIT, "fullatt_block_indexes": [layers - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {**text, "head_dim": 8}
    return Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
