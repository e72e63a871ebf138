"""What the programs share: flags, checkpoints, devices, optimizers, measurements."""
