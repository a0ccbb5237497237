"""Measures examples, tokens and flops per second since the last measurement."""

import time
from collections.abc import Mapping

import jax
import numpy as np

from data_pipeline.packing import Step
from redvillm_jax.runtime.chips import peak_flops
from redvillm_jax.runtime.sharding import local_rows, num_batch_shards
from redvillm_jax.training.flops import step_flops


class Speed:
    """Counts steps with `add`; `rates` returns the rates since its last call and starts again.

    matrices: of `flops.matrix_sizes`. Without a known peak of the devices there is no mfu.
    """

    def __init__(self, matrices: tuple[int, int], mesh: jax.sharding.Mesh):
        self.matrices = matrices
        peak = peak_flops(mesh.devices.flat[0])
        self.peak = None if peak is None else peak * mesh.size
        parts = num_batch_shards(mesh)
        self.scale = parts / len(local_rows(mesh, parts))
        self.start_over()

    def start_over(self) -> None:
        self.since, self.questions, self.tokens, self.supervised = time.perf_counter(), 0, 0, 0

    def add(self, step: Step, batch: Mapping[str, np.ndarray]) -> None:
        """Counts a step. batch: this process's rows of it; the tokens of all rows are scaled up from them."""
        self.questions += sum(len(group) for row in step for _, group in row)
        self.tokens += int((batch["group_ids"] > 0).sum()) * self.scale
        self.supervised += int((batch["target_weights"] > 0).sum()) * self.scale

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        rates = {"examples_per_second": self.questions / seconds, "tokens_per_second": self.tokens / seconds}
        if self.peak is not None:
            rates["mfu"] = step_flops(self.matrices, self.tokens, self.supervised) / (seconds * self.peak)
        self.start_over()
        return rates
