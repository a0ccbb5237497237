"""Measures the loss of accuracy of 8 bits: logits of a trained run against bfloat16 and float32.

python benchmarks/int8_accuracy.py --model=RUN --data=STREAMS

Every supervised token of the store's questions is predicted by the same trained projectors and the frozen language
model in float32, in bfloat16, and in bfloat16 with 8-bit matrices. The table compares with float32: relative
difference of the logits, share of tokens whose most probable token is another one, and the mean loss.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from data_pipeline.pipeline import batches
from data_pipeline.store import open_store
from redvillm_jax.inference.open_model import open_model
from redvillm_jax.model.build import load_model, put_trained
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import check_store, model_settings, needed_parts
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training.rows import plan_rows, row_settings

VARIANTS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "bfloat16, int8": ("bfloat16", True)}


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/int8_accuracy.py", __doc__)
    parser.add_argument("--model", required=True, help="a run of redvillm_jax.train")
    parser.add_argument("--data", required=True, help="a store of frames or streams with questions")
    flags = parser.parse_args(argv)
    config, base, trained, *_ = open_model(flags.model)
    store = open_store(flags.data)
    check_store(store, base, model_settings(config))
    config = {**config, "num_epochs": 1}
    places, tokenizer = VideoPlaces(base, model_settings(config)), base.module.Tokenizer(base.path)
    plan = plan_rows(row_settings(config), base, store, tokenizer, places)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def predict(dtype: str, int8: bool) -> tuple[np.ndarray, np.ndarray]:
        """Logits (targets, vocab_size) fp32 and ids (targets,) of all supervised tokens."""
        model = load_model(
            base, model_settings({**config, "int8": int8}), mesh, dtype=jnp.dtype(dtype), parts=needed_parts(store)
        )
        put_trained(model, trained)
        graphdef, weights = nnx.split(model)
        step = jax.jit(lambda weights, batch: nnx.merge(graphdef, weights).target_logits(batch, jnp.dtype(dtype)))
        logits, ids = [], []
        for batch in batches(plan.steps, plan.row_fn, store, rows_per_step=plan.bounds.rows_per_step):
            real = batch["target_weights"] > 0
            logits.append(np.asarray(step(weights, batch))[real])
            ids.append(batch["target_ids"][real])
        return np.concatenate(logits), np.concatenate(ids)

    exact, ids = predict(*VARIANTS["float32"])
    print(f"{len(ids):,} supervised tokens of {len(plan.instructions):,} questions, {flags.model}")
    print("| language model | difference of logits | other first choice | mean loss |\n|---|---|---|---|")
    for name, variant in VARIANTS.items():
        logits, _ = predict(*variant)
        difference = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
        other = (logits.argmax(-1) != exact.argmax(-1)).mean()
        loss = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, None], 1).mean()
        print(f"| {name} | {difference:.4f} | {other:.2%} | {loss:.4f} |")


if __name__ == "__main__":
    run(main)
