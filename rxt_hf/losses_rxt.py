# Copyright 2026 the rxt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Losses beside that of the next tokens, and what each row of a batch weighs in them."""

import torch
import torch.nn.functional as F

from .layers_rxt import upcast


def load_balancing_losses(router_logits, top_k, weights):
    r"""
    Returns the load-balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6) of each row, over
    its tokens of all layers: `num_experts * sum_e(share of the choices that fall on e * mean probability of e)`.
    `weights` of (batch_size, tokens) are 0 at padding.
    """
    probabilities = torch.stack([F.softmax(upcast(logits), dim=-1) for logits in router_logits])
    layers, _, num_experts = probabilities.shape
    probabilities = probabilities.unflatten(1, weights.shape).transpose(0, 1).flatten(1, 2)
    weights = weights.to(probabilities).repeat(1, layers)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    chosen = torch.topk(probabilities, top_k, dim=-1).indices
    choices = F.one_hot(chosen, num_experts).to(weights).sum(dim=-2)
    shares = (choices * weights[..., None]).sum(1)
    means = (probabilities * weights[..., None]).sum(1)
    return num_experts * (shares * means).sum(-1)


def row_shares(counts, labels=None, num_items_in_batch=None):
    """
    Returns the weight of each row, (batch_size,), in a loss other than that of the tokens: its share of the labels of
    the optimizer step. Their number is all that a model knows about the step's other batches and processes, and so the
    gradient does not depend on how a step is split. Without labels it is the row's share of `counts`, the number of
    items that its loss is a mean over.
    """
    if labels is None:
        return counts / counts.sum().clamp(min=1)
    counts = labels[..., 1:].ne(-100).flatten(1).sum(1)
    return counts / (counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def refuse_labels_taken_away(labels, num_items_in_batch, lost):
    """Raises `ValueError` where `Trainer` counts labels and then keeps them for its own loss on the logits alone."""
    if labels is None and num_items_in_batch is not None:
        raise ValueError(
            f"The labels were taken away before forward, so that {lost} would be lost: leave out "
            "label_smoothing_factor and compute_loss_func."
        )
