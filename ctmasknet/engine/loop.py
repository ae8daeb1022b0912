"""The training loop: one for both tasks, for one process or many."""

from __future__ import annotations

from contextlib import closing

import torch

from ctmasknet.engine.batches import EpochBatches, make_loader, seed_step
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.run import Run, StopRequest, TrainResult, Watch
from ctmasknet.engine.setup import learning_rate, prepare, start_accelerator


def train(config: TrainConfig) -> TrainResult:
    """Train a variant, or continue where an interrupted run stopped.

    A step is `accumulate` forward passes per process, one reduction of gradients and losses, one update. Everything
    random in it is a function of (seed, epoch, batch), so a resumed run repeats an uninterrupted one.

    Raises:
        ConfigError, DataError, WeightsError: the text names the file or field and the fix.
        CTMaskNetError: the run folder cannot be written, or training diverged; checkpoints are intact.
        MissingExtraError: a package of the extra ``train`` is not installed.
    """
    accelerator = start_accelerator(config)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    setup = prepare(config, device, rank=rank, world=world)
    batches = EpochBatches(len(setup.names), config, rank=rank, world=world, weights=setup.weights)
    loader = make_loader(setup.samples, batches, workers=config.workers, device=device)
    steps = batches.steps * config.epochs
    run = Run(config, setup, batches, writes=accelerator.is_main_process)
    run.open()
    accelerator.wait_for_everyone()
    model, optimizer = accelerator.prepare(setup.trained, run.optimizer)
    state, watch = run.state, Watch(run, accelerator)

    with StopRequest() as stop, closing(run.tensorboard):
        while not state.done:
            model.train()
            run.begin_epoch()
            for batch in run.progress(loader):
                seed_step(config.seed, state.epoch, state.batch, rank)
                with accelerator.accumulate(model):
                    inputs = batch.to(device)
                    losses = model(inputs.images, inputs.targets)
                    accelerator.backward(sum(losses.values()))
                    watch.add(losses, batch.names)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm or float("inf"))
                        if watch.step_is_finite(norm, stop):
                            set_rate(optimizer, learning_rate(config, state.step, steps))
                            optimizer.step()
                            run.average.update(setup.trained, step=state.step - state.skipped + 1)
                        state.step += 1
                    optimizer.zero_grad()
                state.batch += 1
                if accelerator.sync_gradients and (stop.agreed or run.checkpoint_is_due()):
                    run.save()
                if stop.agreed:
                    return run.result()
            run.end_epoch(steps)
            run.save()
            accelerator.wait_for_everyone()
    run.finish()
    return run.result()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
