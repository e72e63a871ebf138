"""
Muon for any machine: torch.optim.Muon with another arithmetic.

Newton-Schulz in PyTorch takes the matrices one by one, always in bfloat16, which a CPU without bfloat16 instructions computes about a
hundred times slower than float32. Here matrices of one shape go through it together, in float32 unless a GPU does it.
"""
from collections import defaultdict

import torch


def orthogonalize(G, coefficients, steps, eps):
    """
    Newton-Schulz: the nearest orthogonal matrix to each G (n, rows, columns), its singular values brought to about 1 (0.7 to 1.2) by a
    polynomial of degree 5 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    X = G.bfloat16() if G.is_cuda else G.float()
    if G.size(1) > G.size(2):
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Muon):
    """The arguments and the state of torch.optim.Muon, and its default update: Nesterov's momentum, learning rate * sqrt(rows / columns)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                ahead = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    ahead.append(p.grad.lerp(momentum, group["momentum"]))
                updates = orthogonalize(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
