"""Batches, made ahead by other processes while the model trains: a GPU would wait for stories."""
from torch.utils.data import DataLoader


def batches(corpus, config, step, rank, world, device):
    """
    The batches of one process from an update up to the next evaluation, at which a curriculum may move on, as TrainConfig says
    -> an iterator of inputs and targets, the same ones whatever num_workers is
    """
    n = config.gradient_accumulation_steps
    until = min(config.max_iters, step - step % config.eval_interval + config.eval_interval)
    parts = [(update, micro * world + rank) for update in range(step, until) for micro in range(n)]
    ahead = dict(multiprocessing_context="fork", prefetch_factor=8) if config.num_workers else {}
    return iter(DataLoader(parts, batch_size=None, collate_fn=lambda part: corpus.batch(config, *part), num_workers=config.num_workers,
                           pin_memory=device.type == "cuda", **ahead))  # from pinned memory it is copied while Python goes on
