"""`medusa train` under FSDP2 on CPU processes, where accelerate itself would fall back to DDP: run by torchrun."""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main() -> None:
    os.environ |= FSDP
    original = PartialState.__init__

    def sharding(self, *args, **kwargs):
        """accelerate shards on accelerators only, though FSDP2 itself runs on gloo as well: let it take these for some."""
        original(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = sharding
    from medusa.cli import main as medusa
    from medusa.training import losses

    losses.LARGE = 1  # gradients of LM heads are made in the backward pass, when sharded weights were gone in between
    sys.argv = ["medusa", "train", *sys.argv[1:]]
    medusa()


if __name__ == "__main__":
    main()
