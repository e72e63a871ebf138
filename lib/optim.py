"""
Muon for any machine: torch.optim.Muon with another arithmetic.

Newton-Schulz in PyTorch takes the matrices one by one, always in bfloat16, which a CPU without bfloat16 instructions multiplies up to ninety
times slower than float32. Here matrices of one shape go through it together, in float32, or under autocast in bfloat16, like every matmul.
"""
from collections import defaultdict

import torch


def orthogonalize(G, coefficients, steps, eps):
    """
    Newton-Schulz: the nearest orthogonal matrix to each G (n, rows, columns), its singular values brought near 1 by a polynomial of
    degree 5 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    X = G.mT if G.size(1) > G.size(2) else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Muon):
    """torch.optim.Muon as it is by default (Nesterov's momentum, a tall matrix moves sqrt(rows / columns) times as far); state alike."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)  # options that step() would not heed are not taken

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
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    ahead.append(p.grad.lerp(momentum, group["momentum"]))
                updates = orthogonalize(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
