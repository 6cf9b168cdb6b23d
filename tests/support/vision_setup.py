"""A vision-language model of a few thousand parameters, its processor and rows with images, all built here."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 28, 14
TEMPLATE = (
    "{% for m in messages %}[{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}]{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


def vision_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<eos>", "<image>", "<unk>", *"0123456789[]:?ab"])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def vision_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=vision_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def vision_model() -> LlavaForConditionalGeneration:
    tokenizer = vision_tokenizer()
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**shape, image_size=SIDE, patch_size=PATCH, projection_dim=16),
            text_config=LlamaConfig(
                **shape, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def vision_rows(rows: int = 4) -> Dataset:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(rows)]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{row}?"}], "image": pictures[row], "hint": "1"}
            for row in range(rows)
        ]
    )
