"""Every default once: the paper's recipe (section 4.1) and what Video-ChatGPT's code adds to it.

A new field needs two more lines: its bounds in redvillm_jax/model/config_bounds.py, and in run_config.py beside it what
runs without the field were trained with.
"""

from ml_collections import ConfigDict


def get_common() -> ConfigDict:
    """The defaults that all bases share; a config file adds its family and its data."""
    return ConfigDict(
        dict(
            # What is trained on what. Folders are made by conversion.from_torch and data_pipeline.prepare.
            family="",
            base="",
            data="",
            seed=0,
            # The video representation; it adds fields of its own (redvillm_jax/video/), as the base does.
            video="red_villm",
            num_frames=100,
            sampling="uniform",  # which frames, as the store was prepared with: uniform | fps=F | every=N
            # The text.
            language="",  # train on the questions in one language, as the store names them; "": on all
            labels="answer",  # answer | finetune: what the base's own fine-tuning supervises
            pack=True,  # several questions behind one video prefix; False: one question per row
            row_length=0,  # slots per row; 0: the longest question, or 2048 when packed
            # The recipe.
            num_epochs=3,  # another number for a run that goes on: the schedule is then that of the new total
            batch_questions=32,
            learning_rate=2e-5,
            learning_rate_scale=dict(),  # by optimizer group of the representation; 1 for those that are not named
            weight_decay=dict(),  # likewise, 0
            warmup_ratio=0.03,
            clip_norm=1.0,
            # The machine.
            dtype="bfloat16",  # of frozen weights and activations; what is trained stays float32
            remat="full",  # what the backward pass computes again: none | full | all but the activations named
            int8=False,  # the matrices of the language model's layers in 8 bits
            attention="auto",  # the kernel of a train step's attention: auto | xla | splash (TPU) | cudnn (NVIDIA GPU)
            mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: the rest of the devices
            num_workers=0,  # processes that read frames; 0: threads
            log_every=10,
            checkpoint_every=500,
            keep_checkpoints=2,
        )
    )
