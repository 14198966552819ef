"""One process of a distributed run: trains a tiny student and writes what it saw as JSON.

    torchrun --nproc_per_node 2 tests/distributed/worker.py FOLDER PER_DEVICE_BATCH

FOLDER holds `student` and `teacher`, saved with their tokenizer; the result goes to `FOLDER/result-RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from helpers import config

from trl_distill import OPDTrainer


def main(folder: Path, per_device_batch: int) -> None:
    torch.set_num_threads(1)
    prompts = Dataset.from_dict({"prompt": [" ".join("abcdefgh"[i % 8 :][: 1 + i % 5]) + " z" for i in range(32)]})
    trainer = OPDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config(folder / "out", per_device_train_batch_size=per_device_batch, max_steps=3, ddp_backend="gloo"),
        train_dataset=prompts,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
    result = {
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "processes": trainer.accelerator.num_processes,
        "steps": [
            {key: row[key] for key in ("loss", "grad_norm", "distill/reverse_kl", "entropy")}
            for row in trainer.state.log_history
            if "loss" in row
        ],
        "weights": weights.double().tolist(),
    }
    (folder / f"result-{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
