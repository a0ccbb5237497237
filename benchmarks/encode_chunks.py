"""Estimates with the compiler how long a chip takes to encode a video, by the number of pictures at a time.

python benchmarks/encode_chunks.py --config=configs/llava.py --topology=v5e-16 [--pictures=5,10,25,50,100]
"""

from data_pipeline.common.errors import run
from redvillm_jax.model import video_llm
from redvillm_jax.model.base_folder import load_base_module, sized_base
from redvillm_jax.plan import shapes_only
from redvillm_jax.planning.programs import compile_encode
from redvillm_jax.runtime.chips import parse_topology, tpu_devices
from redvillm_jax.runtime.cli import parse

OPTIONS = {
    "topology": ("v5e-16", "The slice; the step is that of one of its hosts."),
    "size": (None, "A named size of the family (its first)."),
    "pictures": ("5,10,25,50,100", "How many at a time."),
}


def main(argv: list[str]) -> None:
    flags = parse(argv, __doc__, OPTIONS)
    config = flags["config"]
    size = flags["size"] or next(iter(load_base_module(config["family"]).SIZES))
    base = shapes_only(sized_base(config["family"], size))
    chip, _ = parse_topology(flags["topology"])
    devices = tpu_devices(flags["topology"])
    host = [device for device in devices if device.process_index == devices[0].process_index]
    print("pictures at a time  seconds a video and chip  GiB of temporaries")
    for pictures in map(int, flags["pictures"].split(",")):
        video_llm.IMAGES_PER_DEVICE = pictures
        program = compile_encode(config, base, host, chip, len(host), None)
        print(f"{pictures:>18}  {program.seconds:>24.3f}  {program.temporaries / 2**30:>18.2f}", flush=True)


if __name__ == "__main__":
    run(main)
