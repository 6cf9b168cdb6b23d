"""Train under torchrun with responses that depend on (step, row) alone; argv: folder, rows a rank, credit, timing."""

import os
import sys
from pathlib import Path

import torch
from trl_setup import ALPHABET, config, trainer

from tokencredit import seeds
from tokencredit.adapters.trl import CreditGRPOTrainer


def rollout(prompts, host):
    """Random text of 1 to 8 characters and EOS; row 5 is empty but for EOS."""
    first = host.accelerator.process_index * len(prompts)
    ids = []
    for index in range(len(prompts)):
        stream = seeds.generator("rows", host.state.global_step, first + index)
        length = int(torch.randint(1, 8, (), generator=stream))
        text = torch.randint(2, 2 + len(ALPHABET), (length,), generator=stream).tolist()
        ids.append([*([] if first + index == 5 else text), 1])
    prompt_ids = host.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * len(row) for row in ids]}


def main() -> None:
    folder, rows, credit, timing = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    arguments = config(folder / "out", per_device_train_batch_size=rows, max_steps=2)
    records = folder / "records"
    built = trainer(CreditGRPOTrainer, arguments, credit=credit, timing=timing, rollout_func=rollout, records=records)
    built.train()
    if built.accelerator.is_main_process:
        losses = [log["grad_norm"] for log in built.state.log_history if "grad_norm" in log]
        (folder / "result.txt").write_text(f"{built.accelerator.num_processes}\n{losses}\n")
    if built.accelerator.num_processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts while the interpreter shuts down; the results are written


if __name__ == "__main__":
    main()
