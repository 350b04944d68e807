"""`recipes/continual.py`, where gloo processes on CPU may use FSDP too; accelerate lets GPUs only, torch both."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from pm_llm.cli import main

made = PartialState.__init__


def init(self, *args, **kwargs) -> None:
    made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
