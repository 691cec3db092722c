"""The momentum teacher in a Lightning module: interrupted and resumed, a run gives the same numbers.

The teacher is a submodule like any other: Lightning saves and restores it with the rest. It references the student
without registering it, so the student's parameters are saved once and stepped once.

    pip install pytorch-lightning
    python examples/lightning_resume.py

The recipe trains four epochs, resumes a fresh module from the checkpoint of the second, and compares the two runs.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from momentum_bn import MomentumTeacher


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Encoder and predictor."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class SelfSupervised(pl.LightningModule):
    """Student, predictor and momentum teacher over vectors of 32 values."""

    def __init__(self, total_steps: int, seed: int = 0) -> None:
        """`total_steps` is configuration, not state: a resumed run must be given the same one."""
        super().__init__()
        self.save_hyperparameters()
        self.seed = seed
        self.student = mlp(32, 64, 16)
        self.predictor = mlp(16, 64, 16)
        self.teacher = MomentumTeacher(self.student, total_iters=total_steps)
        self.losses: list[float] = []

    def train_dataloader(self) -> DataLoader:
        """The order of an epoch depends on seed and epoch alone: Lightning tells a DistributedSampler the epoch."""
        data = TensorDataset(torch.randn(256, 32, generator=torch.Generator().manual_seed(self.seed)))
        sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=self.seed)
        return DataLoader(data, batch_size=32, sampler=sampler)

    def augment(self, batch: Tensor, view: int) -> Tensor:
        """Noise that only depends on seed, step and view."""
        noise = torch.Generator().manual_seed((self.seed * 1_000_003 + self.global_step) * 2 + view)
        return batch + 0.3 * torch.randn(batch.shape, generator=noise).to(batch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The teacher is updated before its forwards: it follows the student of the step before."""
        view1, view2 = self.augment(batch[0], 0), self.augment(batch[0], 1)
        self.teacher.update()
        target1, target2 = self.teacher(view1), self.teacher(view2)
        foretold1, foretold2 = self.predictor(self.student(view1)), self.predictor(self.student(view2))
        similarity = torch.cosine_similarity(foretold1, target2) + torch.cosine_similarity(foretold2, target1)
        loss = 2 - similarity.mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The teacher's parameters take no gradient: they are left out."""
        return torch.optim.SGD([*self.student.parameters(), *self.predictor.parameters()], lr=0.05, momentum=0.9)


def fit(seed: int, epochs: int, folder: Path, resume: Path | None = None) -> SelfSupervised:
    """Trains a fresh module, from the start or from a checkpoint; leaves a checkpoint of every epoch in `folder`."""
    pl.seed_everything(seed, verbose=False)
    module = SelfSupervised(total_steps=epochs * 8, seed=seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return module


def main() -> None:
    """Trains twice and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    with tempfile.TemporaryDirectory() as folder:
        whole = fit(args.seed, args.epochs, Path(folder))
        resumed = fit(args.seed, args.epochs, Path(folder), resume=Path(folder) / f"epoch={args.epochs // 2 - 1}.ckpt")

    second_half = whole.losses[len(whole.losses) - len(resumed.losses) :]
    print(f"loss from epoch {args.epochs // 2} on, whole run:   " + " ".join(f"{x:.6f}" for x in second_half))
    print(f"loss from epoch {args.epochs // 2} on, resumed run: " + " ".join(f"{x:.6f}" for x in resumed.losses))
    assert resumed.losses == second_half
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    print(f"the same bits in all {len(whole.state_dict())} tensors of student, predictor and teacher")


if __name__ == "__main__":
    main()
