"""Batches, made ahead by other processes while the model trains: a GPU would wait for stories."""
from torch.utils.data import DataLoader


def batches(corpus, config, step, rank, world, device):
    """
    The batches of one process from an update up to the next evaluation, where a curriculum may move on. corpus: Corpus or Stories,
    config: TrainConfig -> an iterator of inputs and targets, the same ones whatever num_workers is
    """
    until = min(config.max_iters, step - step % config.eval_interval + config.eval_interval)
    parts = [(update, micro * world + rank) for update in range(step, until) for micro in range(config.gradient_accumulation_steps)]
    ahead = dict(multiprocessing_context="fork", prefetch_factor=8) if config.num_workers else {}  # a fork has the corpus as it stands
    return iter(DataLoader(parts, batch_size=None, collate_fn=lambda part: corpus.batch(config, *part), num_workers=config.num_workers,
                           pin_memory=device.type == "cuda", **ahead))  # from pinned memory it is copied while Python goes on
