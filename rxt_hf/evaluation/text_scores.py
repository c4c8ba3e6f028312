# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
BLEU (Papineni et al., 2002) of many answers at once, on the device that they are on.

Rows are token ids; a negative id is no token, so that labels with their -100 can be passed as they are. The tokens of
a row must follow each other. One reference for each candidate.
"""

import re
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

MAX_ORDER = 4


def ngram_counts(candidates: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Matches, clipped at the number of times that the reference has an n-gram, and n-grams of the candidates.

    Args:
        candidates (`torch.LongTensor` of shape `(rows, tokens)`): negative where there is no token.
        references (`torch.LongTensor` of shape `(rows, reference_tokens)`): the same.

    Returns: two tensors of shape `(rows, 4)`, for n-grams of one to four tokens.
    """
    is_token = candidates >= 0
    # what two places have in common; an n-gram is there twice if its n tokens are, one step further each
    own = (candidates[:, :, None] == candidates[:, None, :]) & is_token[:, :, None]
    found = (candidates[:, :, None] == references[:, None, :]) & is_token[:, :, None]
    own_tokens, found_tokens, matches, totals = own, found, [], []
    for order in range(MAX_ORDER):
        if order:
            own = own[:, :-1, :-1] & own_tokens[:, order:, order:]
            found = found[:, :-1, :-1] & found_tokens[:, order:, order:]
        count = own.sum(-1)
        # the count occurrences of one n-gram share its matches
        shares = torch.minimum(count, found.sum(-1)) / count.clamp(min=1)
        matches.append(shares.sum(-1).round())
        totals.append((count > 0).sum(-1))
    return torch.stack(matches, dim=-1), torch.stack(totals, dim=-1)


def sentence_bleu(candidates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    r"""
    BLEU of each row, between 0 and 1, smoothed for sentences as by Lin and Och (2004):

        min(1, exp(1 - r / c)) * exp(mean_n log p_n),   p_1 = m_1 / t_1,   p_n = (m_n + 1) / (t_n + 1) for n = 2, 3, 4

    with `m` matches among `t` n-grams and `c` and `r` tokens of candidate and reference; 0 without a common token.

    Args: see [`ngram_counts`].

    Returns: `torch.FloatTensor` of shape `(rows,)`.
    """
    matches, totals = ngram_counts(candidates, references)
    plus = torch.tensor([0.0] + [1.0] * (MAX_ORDER - 1), device=matches.device)
    lengths = (references >= 0).sum(-1)
    return _bleu(matches + plus, totals + plus, totals[:, 0], lengths)


def corpus_bleu(candidates: torch.Tensor, references: torch.Tensor) -> float:
    """BLEU of all rows together, without smoothing: their matches, n-grams and tokens are summed first."""
    matches, totals = (counts.sum(0) for counts in ngram_counts(candidates, references))
    return _bleu(matches, totals, totals[0], (references >= 0).sum()).item()


def _bleu(matches, totals, length, reference_length):
    # log 0 is -inf and makes the score 0
    precision = (matches / totals.clamp(min=1)).log().mean(-1).exp()
    return precision * (1 - reference_length / length.clamp(min=1)).clamp(max=0).exp()


def word_ids(candidates: Sequence[str], references: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both columns as [`ngram_counts`] takes them, a word or a punctuation mark a token, in exactly its case."""
    ids: dict[str, int] = {}
    columns = []
    for texts in (candidates, references):
        rows = [[ids.setdefault(word, len(ids)) for word in re.findall(r"\w+|[^\w\s]", text)] for text in texts]
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        columns.append(pad_sequence(tensors, batch_first=True, padding_value=-100))
    return columns[0], columns[1]
