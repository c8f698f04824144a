"""Run a script as each process of `accelerate launch` on the CPU, sharded: ``launched_on_cpu.py script.py arguments``.

With the environment variable ``DIE_AT_STEP`` the last rank kills itself when Trainer begins that step.
"""

import os
import runpy
import signal
import sys

import torch
import transformers.trainer
from transformers import TrainerCallback

from fsdp_on_cpu import accelerate_shards


class DieAtStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if last and state.global_step == int(os.environ["DIE_AT_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "DIE_AT_STEP" in os.environ:
        transformers.trainer.DEFAULT_CALLBACKS.append(DieAtStep)
    sys.argv = sys.argv[1:]
    with accelerate_shards():
        runpy.run_path(sys.argv[0], run_name="__main__")
