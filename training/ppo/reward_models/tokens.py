"""CLIP's vocabulary as the two libraries read prompts that the published scores were made with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Tokens that CLIP reads, start and end included.
CONTEXT_LENGTH = 77


class OpenAITokenizer:
    """OpenAI's: broken characters are mended, HTML entities resolved, then lower case; padded with 0."""

    def __init__(self, length: int = CONTEXT_LENGTH) -> None:
        import open_clip

        self.length = length
        self.tokenizer = open_clip.SimpleTokenizer(context_length=length)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """int64 `[N, length]`; longer prompts are cut and keep their end-of-text token."""
        return self.tokenizer(list(prompts))

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than `length` with start and end."""
        return sum(len(self.tokenizer.encode(prompt)) + 2 > self.length for prompt in prompts)


class TransformersTokenizer:
    """transformers': lower case, nothing mended; padded with the end-of-text token."""

    def __init__(self, length: int = CONTEXT_LENGTH) -> None:
        from training.denoisers.single_file import clip_tokenizer

        self.length = length
        self.tokenizer = clip_tokenizer(length)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """int64 `[N, length]`; longer prompts are cut and keep their end-of-text token."""
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than `length` with start and end."""
        # verbose=False: the tokenizer's own warning about long prompts would repeat what is counted here.
        return sum(len(ids) > self.length for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
