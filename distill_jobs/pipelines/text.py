"""Prompts to conditions: the tokenizer and text encoders of a pipeline folder, for training and for export.

Equals ``encode_prompt`` of StableDiffusionPipeline (the last hidden state) and of StableDiffusionXLPipeline
(the second last of each encoder, side by side, and the projected embedding of the second as ``pooled``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill_jobs.data.source import Condition
from distill_jobs.errors import TeacherError, first_line
from distill_jobs.pipelines.folder import FOLD, PipelineFolder, weights_variant
from engines.condition import ClipTokenizer

LEAST_OF_ROWS = 0.9
"""Of an encoder's embedding, that the tokenizer must have words for: some are padded to round numbers."""

_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class TextEncoders(nn.Module):
    """One or two CLIP text encoders. end: id that ends a prompt; pads: what each encoder is fed after it."""

    pads: Tensor

    def __init__(self, encoders: Sequence[nn.Module], end: int, pads: Sequence[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.end = end
        self.register_buffer("pads", torch.tensor(pads), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(condition (B, T, D),), with pooled (B, P) where there are two encoders.

        tokens: (B, T) int64, one ``end`` a row; what follows it is replaced by each encoder's own padding.
        """
        ends = (tokens == self.end).long()
        after = (ends.cumsum(1) - ends) > 0
        fed = [torch.where(after, self.pads[i], tokens) for i in range(len(self.encoders))]
        if len(self.encoders) == 1:
            return (self.encoders[0](fed[0]).last_hidden_state,)
        outs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.encoders, fed, strict=True)]
        return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[1].text_embeds


class PromptEncoder:
    """Captions to conditions in torch. zeros_for_empty: the empty condition is zeros, not an encoded ""."""

    def __init__(self, encoders: TextEncoders, tokenizer: ClipTokenizer, zeros_for_empty: bool) -> None:
        self.encoders = encoders.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._zeros_for_empty = zeros_for_empty

    @classmethod
    def load(cls, folder: PipelineFolder) -> PromptEncoder:
        """Raises: TeacherError when weights are missing, or tokenizers and encoders do not belong together."""
        stock = [_stock_tokenizer(folder, part) for part in folder.tokenizers]
        if any(other.get_vocab() != stock[0].get_vocab() for other in stock[1:]):
            raise TeacherError(f"{folder.path}: tokenizer and tokenizer_2 have different vocabularies")
        parts = [load_part(folder, part, _CLASSES[part]) for part in folder.encoders]
        for part, encoder in zip(folder.encoders, parts, strict=True):
            words, rows = len(stock[0]), int(encoder.config.vocab_size)  # type: ignore[union-attr, arg-type]
            if not LEAST_OF_ROWS * rows <= words <= rows:
                raise folder.wrong(f"its tokenizer has {words} words, its {part} {rows}: they are not of one model")
        encoders = TextEncoders(
            parts,
            end=int(stock[0].eos_token_id),
            pads=[int(one.pad_token_id) for one in stock],
        )
        backend = stock[0].backend_tokenizer
        backend.no_truncation()
        backend.enable_padding(length=folder.tokens, pad_id=encoders.end, pad_token=str(stock[0].eos_token))
        return cls(encoders, ClipTokenizer(backend.to_str(), folder.tokens), folder.zeros_for_empty)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], time_ids: Tensor | None = None) -> Condition:
        """Conditions of captions, cut where they are too long. time_ids: (B, 6) of SDXL layouts."""
        tokens = torch.stack([torch.from_numpy(self.tokenizer.cut(caption)) for caption in captions])
        return self._condition(tokens, time_ids)

    @torch.no_grad()
    def null(self, time_ids: Tensor | None = None) -> Condition:
        """The empty condition, one row: what guidance points away from. time_ids: (1, 6)."""
        empty = self.encode([""], time_ids)
        if not self._zeros_for_empty:
            return empty
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return Condition(torch.zeros_like(empty.tokens), pooled, time_ids)

    def _condition(self, tokens: Tensor, time_ids: Tensor | None) -> Condition:
        device = self.encoders.pads.device
        out = self.encoders(tokens.to(device))
        pooled = out[1] if len(out) > 1 else None
        at = None if pooled is None or time_ids is None else time_ids.to(device)
        return Condition(out[0], pooled, at)


def load_part(folder: PipelineFolder, part: str, kind: type[nn.Module]) -> nn.Module:
    """A component in float32, every weight from the file. Raises: TeacherError naming what is missing."""
    where = folder.path / part
    try:
        model, info = kind.from_pretrained(  # type: ignore[attr-defined]
            where,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            variant=weights_variant(where),
            torch_dtype=torch.float32,
        )
    except Exception as error:  # what the libraries make of damaged files and configs has no common base
        raise TeacherError(f"{where} cannot be loaded: {first_line(error)}") from None
    wrong = [*info["missing_keys"], *(str(key[0]) for key in info.get("mismatched_keys", ()))]
    if any(".lora_" in name for name in info["unexpected_keys"]):
        raise TeacherError(f"{where}: the weights hold a LoRA beside what it changes; {FOLD}")
    if wrong:
        raise TeacherError(f"{where}: the weights lack {sorted(wrong)[0]} and {len(wrong) - 1} more")
    if part == "unet" and info["unexpected_keys"]:  # text encoders are often saved with parts not used here
        raise TeacherError(f"{where}: the weights hold {sorted(info['unexpected_keys'])[0]}, its config does not")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _stock_tokenizer(folder: PipelineFolder, part: str) -> CLIPTokenizer:
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder.path / part, local_files_only=True)
    except Exception as error:  # as above
        raise TeacherError(f"{folder.path / part} is not a CLIP tokenizer: {first_line(error)}") from None
    return tokenizer
