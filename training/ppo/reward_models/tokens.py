"""CLIP's vocabulary as the libraries read prompts that the published scores were made with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Tokens that CLIP reads, start and end included.
CONTEXT_LENGTH = 77


class OpenClipTokenizer:
    """open_clip's: broken characters are mended, HTML entities resolved, then lower case; padded with 0."""

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


class OpenAITokenizer(OpenClipTokenizer):
    """OpenAI's: the same, but that prompts may hold other names of the start and end tokens."""

    def __init__(self, length: int = CONTEXT_LENGTH) -> None:
        import regex

        super().__init__(length)
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        inner = self.tokenizer
        inner.encoder = {names.get(token, token): index for token, index in inner.encoder.items()}
        inner.cache = {name: name for name in names.values()}
        pattern = inner.pat.pattern
        for old, new in names.items():
            pattern = pattern.replace(old, regex.escape(new))
        inner.pat = regex.compile(pattern, regex.IGNORECASE)


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
