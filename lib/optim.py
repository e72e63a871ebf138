"""
The optimizers of a model: Muon for the hidden matrices, AdamW for everything else.

Muon is torch.optim.Muon with another arithmetic. PyTorch takes the matrices one by one, always in
bfloat16, which a CPU without bfloat16 instructions multiplies up to ninety times slower than
float32. Here matrices of one shape go through Newton-Schulz together, in float32, or under
autocast in bfloat16, like every matmul. Several processes share the matrices out.
"""
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def make_optimizers(model, learning_rate, adam_lr, weight_decay, momentum=0.9):
    """
    model: an LM2 or RMT -> [Muon, AdamW]. Muon takes the matrices of all linear layers in the
    blocks; AdamW takes the rest: embedding, head, gains, biases, slot queries, and whatever
    parameters a changed model has. What is frozen is in neither.
    """
    layers = (layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    in_muon = set(matrices)
    others = [p for p in model.parameters() if p.requires_grad and p not in in_muon]
    fused = others[0].device.type != "mps"
    return [Muon(matrices, lr=learning_rate, weight_decay=weight_decay, momentum=momentum),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)]


def orthogonalize(G, coefficients, steps, eps):
    """
    Newton-Schulz: the nearest orthogonal matrix to each G (n, rows, columns), its singular values
    brought near 1 by a polynomial of degree 5
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    X = G.mT if G.size(1) > G.size(2) else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(1) > G.size(2) else X


def orthogonalize_together(G, *schedule):
    """
    orthogonalize(G, *schedule), of which each process computes a part and gathers the others', so
    that all have the same to the bit. All processes must call this together, with the same shape.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return orthogonalize(G, *schedule)
    parts = G.tensor_split(dist.get_world_size())  # the first is the longest, others may be empty
    X = orthogonalize(parts[dist.get_rank()], *schedule)
    padding = len(parts[0]) - len(X)  # all_gather takes one size from all
    X = F.pad(X, (0, 0, 0, 0, 0, padding)).contiguous()
    gathered = [torch.empty_like(X) for _ in parts]
    dist.all_gather(gathered, X)
    return torch.cat([X[:len(part)] for X, part in zip(gathered, parts)])


class Muon(torch.optim.Muon):
    """
    torch.optim.Muon as it is by default: Nesterov's momentum, and a tall matrix moves
    sqrt(rows / columns) times as far. Its state is the same, too, in each of several processes.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        # options that step() would not heed are not taken
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for (rows, columns), params in same_shape.items():
                directions = torch.stack([self.direction(p, group["momentum"]) for p in params])
                directions = orthogonalize_together(directions, group["ns_coefficients"],
                                                    group["ns_steps"], group["eps"])
                for p, direction in zip(params, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def direction(self, p, momentum):
        """Nesterov's momentum: the gradient of p, moved towards the mean of those before."""
        if p not in self.state:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"]
        mean.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)
