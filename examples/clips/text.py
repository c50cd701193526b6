"""The tokenizer and the text encoder of the clip model, and the training of the text encoder."""

from __future__ import annotations

import torch
from captions import BLURRY, COLORS, MOTIONS, SHAPES, Scene, caption_of, random_scenes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_TOKENS = 12  # The longest caption has ten: two objects of four words, the comma and the end.
TEXT_WIDTH = 64
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
IGNORED = -100  # A class that `cross_entropy` ignores.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words, with the words of the captions."""
    special = ["<pad>", "</s>", "<unk>"]
    words = [*COLORS, *SHAPES, *" ".join(MOTIONS).split(), ",", BLURRY]
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()  # It also separates a comma from the word before it.
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", numbers["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_text_encoder() -> UMT5EncoderModel:
    """Returns an untrained UMT5 encoder of width 64 with two blocks. It is Wan's text encoder at a small size."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(build_tokenizer()),
            d_model=TEXT_WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def encode(text_encoder: nn.Module, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Returns the prompt embeddings of captions, float32 [B, 12, 64], as `WanPipeline` computes them.

    The embeddings of padding tokens are zero.
    """
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask
    return text_encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]


def train_text_encoder(
    tokenizer: PreTrainedTokenizerFast, iterations: int, generator: torch.Generator
) -> UMT5EncoderModel:
    """Returns a text encoder that is trained on captions alone and does not change afterwards, like Wan's.

    A linear layer, which is not used later, must find the color, the shape and the motion of an object in the embedding
    of each word that describes it. Without this, the transformer would have to learn which words belong together.
    """
    encoder = build_text_encoder().train()
    sizes = [len(COLORS), len(SHAPES), len(MOTIONS)]
    heads = nn.Linear(TEXT_WIDTH, sum(sizes))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=LEARNING_RATE)
    for _ in tqdm(range(iterations), desc="training the text encoder", unit="it"):
        scenes = random_scenes(BATCH_SIZE, generator)
        scores = heads(encode(encoder, tokenizer, [caption_of(scene) for scene in scenes])).split(sizes, dim=-1)
        losses = [cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in zip(scores, _classes(scenes), strict=True)]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def _classes(scenes: list[Scene]) -> Tensor:
    """Returns the color, shape and motion of the object that each token describes, int64 [3, B, 12]."""
    classes = torch.full((3, len(scenes), TEXT_TOKENS), IGNORED)
    for i, scene in enumerate(scenes):
        first = 0
        for o in scene:
            words = len(str(o).split())
            numbers = COLORS.index(o.color), SHAPES.index(o.shape), MOTIONS.index(o.motion)
            classes[:, i, first : first + words] = torch.tensor(numbers)[:, None]
            first += words + 1  # The comma.
    return classes
