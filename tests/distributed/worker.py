"""One process of a distributed run: trains a tiny student and writes what it saw as JSON.

    torchrun --nproc_per_node 2 tests/distributed/worker.py FOLDER PER_DEVICE_BATCH ESTIMATOR
    accelerate launch --config_file deepspeed_configs/zero3_cpu.yaml tests/distributed/worker.py ... (the same)

FOLDER holds `student` and `teacher`, saved with their tokenizer. The result goes to `FOLDER/result-RANK.json`, the
trained student to `FOLDER/out`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from helpers import config

from trl_distill import OPDTrainer


def main(folder: Path, per_device_batch: int, estimator: str) -> None:
    torch.set_num_threads(1)
    prompts = Dataset.from_dict({"prompt": [" ".join("abcdefgh"[i % 8 :][: 1 + i % 5]) + " z" for i in range(32)]})
    trainer = OPDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config(
            folder / "out",
            per_device_train_batch_size=per_device_batch,
            max_steps=3,
            kl_estimator=estimator,
            kl_top_k=4,
            max_grad_norm=1e9,
            ddp_backend="gloo",
            use_cpu=os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",  # would switch DeepSpeed off
        ),
        train_dataset=prompts,
    )
    trainer.train()
    trainer.save_model(str(folder / "out"))
    accelerator, teacher = trainer.accelerator, trainer.teacher.model
    result = {
        "distributed_type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "zero_stage": accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "teacher_parameters_held": sum(getattr(p, "ds_tensor", p).numel() for p in teacher.parameters()),
        "teacher_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in teacher.parameters()),
        "steps": [
            {key: row[key] for key in ("loss", "grad_norm", "distill/reverse_kl", "entropy")}
            for row in trainer.state.log_history
            if "loss" in row
        ],
    }
    (folder / f"result-{accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
