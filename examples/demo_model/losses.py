"""The two losses of the training: next token and load balance."""

from typing import Any

import torch


class NextToken(torch.autograd.Function):
    """Mean cross-entropy of logits (T, V) against targets (T,), whose gradient is made in the forward pass.

    On a CPU it is several times faster than the backward pass of PyTorch's log_softmax.
    """

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = probabilities.gather(1, targets[:, None])
        loss = -chosen.clamp_min(1e-30).log().mean()
        probabilities.scatter_(1, targets[:, None], chosen - 1)
        context.save_for_backward((probabilities / len(targets)).to(logits.dtype))
        return loss

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = context.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of Switch's auxiliary loss, taken over the whole mixed batch: 1 when the load is even.

    `router_logits` holds (T, E) per layer. Since the batch mixes all domains, experts may specialise in one of them.
    """
    losses = []
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
        shares = torch.bincount(chosen, minlength=experts) / len(chosen)
        losses.append(experts * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
