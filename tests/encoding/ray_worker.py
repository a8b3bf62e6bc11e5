"""A driver process: encode with two Ray workers, one of which crashes on its second batch.

python ray_worker.py MODEL SHARDS OUT HOW MARK   HOW: live, die or raise; MARK: file it leaves
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import torch

from latentae.encoding.encode import conclude, prepare
from latentae.encoding.options import EncodeOptions
from latentae.encoding.plan import Encoder
from latentae.encoding.ray_engine import encode_on_ray
from latentae.errors import ModelError
from latentae.options import parse


class Mortal:
    """An encoder that fails at its second batch, if it is the first to leave the mark."""

    def __init__(self, encoder: Encoder, how: str, mark: str) -> None:
        self.encoder, self.how, self.mark, self.batches = encoder, how, Path(mark), 0

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches += 1
        if self.how != "live" and self.batches == 2 and not self.mark.exists():
            self.mark.touch()
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ModelError("the model broke")
        return self.encoder(images)


def mortal(make, how, mark):
    return Mortal(make(), how, mark)


if __name__ == "__main__":
    model, shards, out, how, mark = sys.argv[1:]
    torch.set_num_threads(1)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
    )
    work = prepare(parse(EncodeOptions, model, shards, out, dtype="fp32", batch_size=4, device="cpu"))
    make_encoder = partial(mortal, work.make_encoder, how, mark)
    encode_on_ray(replace(work, make_encoder=make_encoder), lambda count: None)
    print(conclude(work)["finished"])
