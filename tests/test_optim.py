"""Muon: the update of PyTorch's, whatever the shapes, and orthogonal matrices."""
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lib.optim import Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_singular_values_come_to_about_one(shape):
    X = orthogonalize(torch.randn(3, *shape), COEFFICIENTS, 5, 1e-7)
    assert X.shape == (3, *shape) and (torch.linalg.svdvals(X)[:, :12] - 1).abs().max() < 0.4


def test_newton_schulz_runs_in_bfloat16_under_autocast_and_parameters_stay_float32():
    G, p = torch.randn(2, 16, 40), torch.randn(16, 40).requires_grad_()
    p.grad = torch.randn(16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        X = orthogonalize(G, COEFFICIENTS, 5, 1e-7)
        Muon([p], lr=0.1, weight_decay=0.1).step()
    assert X.dtype == torch.bfloat16 and p.dtype == torch.float32
    exact = orthogonalize(G, COEFFICIENTS, 5, 1e-7)
    torch.testing.assert_close(X.float(), exact, rtol=0.1, atol=0.03)


def test_equals_the_muon_of_pytorch():
    """
    Matrices of several shapes, two of one shape, one without a gradient. PyTorch computes in
    bfloat16, hence the tolerance.
    """
    start = [torch.randn(shape) for shape in ((24, 24), (40, 16), (24, 24), (16, 40), (8, 8))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizers = [kind(params, lr=0.1, weight_decay=0.2, momentum=0.9)
                  for kind, params in ((Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(4):
        for p, q in list(zip(ours, theirs))[:-1]:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() <= 0.02 * (q - before).norm()


def test_a_resumed_optimizer_goes_on_as_if_it_had_never_stopped():
    p, q = (torch.eye(8).requires_grad_() for _ in range(2))
    first, second = Muon([p], lr=0.1, weight_decay=0.1), Muon([q], lr=0.1, weight_decay=0.1)
    for step in range(4):
        p.grad = q.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        first.step()
        if step == 2:
            resumed = Muon([q], lr=0.1, weight_decay=0.1)
            resumed.load_state_dict(second.state_dict())
            second = resumed
        second.step()
    assert torch.equal(p, q)


# --- Several processes

def four_steps(bfloat16):
    """
    Muon on three matrices of one shape, one each of two others, and one without a gradient
    -> their weights and momentum, and how many of each shape were orthogonalized in each step
    """
    torch.manual_seed(0)
    shapes = (24, 24), (40, 16), (24, 24), (16, 40), (24, 24), (8, 8)
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    optimizer, counts = Muon(params, lr=0.1, weight_decay=0.2), []
    for _ in range(4):
        for p in params[:-1]:
            p.grad = torch.randn_like(p)
        with (torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
              patch("lib.optim.orthogonalize", wraps=orthogonalize) as watched):
            optimizer.step()
        counts.append([len(call.args[0]) for call in watched.call_args_list])
    momentum = [optimizer.state[p]["momentum_buffer"] for p in params[:-1]]
    return {"weights": [p.detach() for p in params], "momentum": momentum, "counts": counts}


def one_of_two(rank, folder):
    """What each of two processes does; it leaves what it found in the folder."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save([four_steps(bfloat16) for bfloat16 in (False, True)], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_matrices_out_and_step_as_one_does(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for bfloat16, first, second in zip((False, True), *ranks):
        alone = four_steps(bfloat16)
        assert alone["counts"] == [[3, 1, 1]] * 4
        assert first["counts"] == [[2, 1, 1]] * 4
        assert second["counts"] == [[1, 0, 0]] * 4
        for name in ("weights", "momentum"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        tolerance = 1e-2 if bfloat16 else 1e-5
        torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=tolerance)
        torch.testing.assert_close(first["momentum"], alone["momentum"], rtol=0, atol=0)
