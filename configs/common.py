"""The defaults of all config fields: the paper's recipe (section 4.1), completed from Video-ChatGPT's code.

A new field needs two more lines: its bounds in redvillm_jax/model/config_bounds.py, and in run_config.py beside it the
value for runs that were trained before the field existed.
"""

from ml_collections import ConfigDict


def get_common() -> ConfigDict:
    """Returns the defaults that all bases share; a config file adds its family and its data."""
    return ConfigDict(
        dict(
            # The base and the data. conversion.from_torch writes a base folder, data_pipeline.prepare a store.
            family="",
            base="",
            data="",
            seed=0,
            # The video representation. It has fields of its own (redvillm_jax/video/), and so has the base.
            video="red_villm",
            num_frames=100,
            sampling="uniform",  # the rule that chose the store's frames: uniform | fps=F | every=N
            # The text.
            language="",  # train only on questions with this language in the store; "": on all
            labels="answer",  # supervised tokens: answer | finetune, as in the base's own fine-tuning
            pack=True,  # several questions behind one video prefix; False: one question per row
            row_length=0,  # slots per row; 0: the longest question, or 2048 when packed
            # The recipe.
            num_epochs=3,  # if a continued run has another number, its schedule follows the new total
            batch_questions=32,
            learning_rate=2e-5,
            learning_rate_scale=dict(),  # by optimizer group of the representation; 1 for a group that is not named
            weight_decay=dict(),  # by optimizer group; 0 for a group that is not named
            warmup_ratio=0.03,
            clip_norm=1.0,
            # The machine.
            dtype="bfloat16",  # of frozen weights and activations; trained weights are float32
            remat="full",  # recomputed in the backward pass: none | full | all but the activations named
            int8=False,  # hold the matrices of the language model's layers in 8 bits
            attention="auto",  # the kernel of a train step's attention: auto | xla | splash (TPU) | cudnn (NVIDIA GPU)
            mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: the rest of the devices
            num_workers=0,  # number of processes that read frames; 0: threads
            log_every=10,
            checkpoint_every=500,
            keep_checkpoints=2,
        )
    )
