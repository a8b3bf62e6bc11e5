"""Trains on a fixed stream of global batches, of which this process takes its share; the first process saves the weights."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.recipe import load_recipe
from latentae.training.steps import Trainer

recipe, out = load_recipe(sys.argv[1]), sys.argv[2]
accelerator = build_accelerator("fp32")
trainer = Trainer(recipe, accelerator)
world, rank, parts = accelerator.num_processes, accelerator.process_index, recipe.gradient_accumulation
generator = torch.Generator().manual_seed(3)
while not trainer.finished:
    batch = torch.randint(0, 256, (recipe.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    chunks = batch.chunk(parts * world)  # a process owns consecutive samples, as the loader deals them
    trainer.update([chunks[rank * parts + part] for part in range(parts)])
if accelerator.is_main_process:
    parts = {name: part.state_dict() for name, part in trainer.saved.items()}
    save_file({f"{name}.{k}": v.contiguous() for name, state in parts.items() for k, v in state.items()}, out)
close_accelerator(accelerator)
