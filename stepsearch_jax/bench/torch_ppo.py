"""The PPO step of verl in torch: padded rows and full logits, CPU, float32.

What verl 0.1's actor and critic workers compute for a micro-batch, without
Ray, FSDP or GPUs: logits of every token, their log-softmax and entropy, the
clipped losses, AdamW. Reads the same batch as our learner.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers

from stepsearch_jax import types
from stepsearch_jax.bench import peers
from stepsearch_jax.models import decoder


class TorchPpo:
  """Policy, value model and reference with our weights."""

  def __init__(
    self, config: decoder.DecoderConfig, params: types.Tree, micro_rows: int,
    checkpointing: bool, has_value: bool = True,
  ):
    """Builds the models and optimizers.

    Args:
      config, params: of our policy.
      micro_rows: rows of one forward/backward pass.
      checkpointing: compute activations again, as the release is configured.
      has_value: train a value model too; GRPO has none.
    """
    self.policy, self.value = peers.torch_policy(params, config), None
    models = [self.policy]
    if has_value:
      self.value = transformers.LlamaForTokenClassification(
        peers.torch_config(config, num_labels=1)
      )
      self.value.model.load_state_dict(self.policy.model.state_dict())
      models.append(self.value)
    self._micro_rows = micro_rows
    self._optimizers = {
      model: torch.optim.AdamW(
        model.parameters(), lr=1e-6, weight_decay=0.01, foreach=True
      )
      for model in models
    }
    if checkpointing:
      for model in models:
        model.gradient_checkpointing_enable()
        model.train()  # It has no dropout; torch checkpoints in training only.

  def _micros(self, batch: types.RolloutBatch):
    """Yields (ids, mask, rows) of micro-batches, cut to the longest row."""
    width = int(batch.lengths.max())
    for start in range(0, len(batch.tokens), self._micro_rows):
      rows = slice(start, start + self._micro_rows)
      ids = torch.from_numpy(batch.tokens[rows, :width].astype(np.int64))
      inside = torch.arange(width)[None] < torch.from_numpy(
        batch.lengths[rows, None]
      )
      yield ids, inside.long(), rows

  def _logps(self, model, ids, inside):
    """(log-probabilities, entropies) [B, T-1] from all logits."""
    logits = model(ids, attention_mask=inside, use_cache=False).logits[:, :-1]
    logps = torch.log_softmax(logits, dim=-1)
    chosen = torch.gather(logps, -1, ids[:, 1:, None])[..., 0]
    p = torch.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, -1) - (p * logits).sum(-1)
    return chosen, entropy

  def scores(self, batch: types.RolloutBatch) -> np.ndarray:
    """Log-probabilities [B, T] of policy and reference, and values if any.

    The reference has the policy's weights; it is a forward pass of its own.
    """
    out = np.zeros(batch.tokens.shape, np.float32)
    with torch.no_grad():
      for ids, inside, rows in self._micros(batch):
        for _ in ("policy", "reference"):
          logps, _ = self._logps(self.policy, ids, inside)
        if self.value is not None:
          self.value(ids, attention_mask=inside, use_cache=False)
        out[rows, 1 : ids.shape[1]] = logps.numpy()
    return out * batch.policy_mask

  def step(
    self, batch: types.RolloutBatch, advantages: np.ndarray
  ) -> np.ndarray:
    """A whole step; returns the policy's log-probabilities before it.

    Args:
      batch: rollouts.
      advantages: [B, T], which cost next to nothing; also the returns.
    """
    old = self.scores(batch)
    self.update_policy(batch, old, advantages)
    if self.value is not None:
      self.update_value(batch, advantages)
    return old

  def update_policy(
    self, batch: types.RolloutBatch, old: np.ndarray, advantages: np.ndarray
  ) -> float:
    """One optimizer step of the policy; returns the gradient's norm."""
    count = float(batch.policy_mask.sum())
    for ids, inside, rows in self._micros(batch):
      part = (rows, slice(1, ids.shape[1]))
      mask, before, gain = (
        torch.from_numpy(x[part])
        for x in (batch.policy_mask, old, advantages)
      )
      logps, entropy = self._logps(self.policy, ids, inside)
      ratio = torch.exp(logps - before)
      worst = torch.maximum(
        -gain * ratio, -gain * torch.clamp(ratio, 0.8, 1.2)
      )
      loss = ((worst - 0.001 * entropy) * mask).sum() / count
      loss.backward()
    return self._step(self.policy)

  def update_value(
    self, batch: types.RolloutBatch, returns: np.ndarray
  ) -> float:
    """One optimizer step of the value model."""
    count = float(batch.policy_mask.sum())
    for ids, inside, rows in self._micros(batch):
      part = (rows, slice(1, ids.shape[1]))
      mask, target = (
        torch.from_numpy(x[part]) for x in (batch.policy_mask, returns)
      )
      values = self.value(
        ids, attention_mask=inside, use_cache=False
      ).logits[:, :-1, 0]
      loss = (0.5 * (values - target) ** 2 * mask).sum() / count
      loss.backward()
    return self._step(self.value)

  def _step(self, model) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    self._optimizers[model].step()
    self._optimizers[model].zero_grad()
    return float(norm)
