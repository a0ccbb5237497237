"""Estimates with the compiler how long a chip takes to encode a video, by the number of pictures at a time.

python benchmarks/encode_chunks.py --config=configs/llava.py --topology=v5e-16 [--pictures=5,10,25,50,100]
"""

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from data_pipeline.common.tables import table_row
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model import video_llm
from redvillm_jax.model.base_folder import sized_base
from redvillm_jax.model.settings import complete, model_settings
from redvillm_jax.plan import shapes_only
from redvillm_jax.planning.programs import compile_encode
from redvillm_jax.runtime.chips import parse_topology, tpu_devices
from redvillm_jax.runtime.cli import parse


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/encode_chunks.py", __doc__, needed=("config",))
    parser.add_argument("--topology", default="v5e-16", help="the slice; the step is one host's (%(default)s)")
    parser.add_argument("--size", help="named size of the family (its first)")
    parser.add_argument("--pictures", default="5,10,25,50,100", help="how many at a time (%(default)s)")
    flags = parse(parser, argv, complete)
    config = flags.config
    size = flags.size or next(iter(load_family(config["family"]).SIZES))
    base = shapes_only(sized_base(config["family"], size))
    chip, _ = parse_topology(flags.topology)
    devices = tpu_devices(flags.topology)
    host = [device for device in devices if device.process_index == devices[0].process_index]
    columns = (">18", "  >24", "  >18")
    print(table_row(("pictures at a time", "seconds a video and chip", "GiB of temporaries"), columns))
    for pictures in map(int, flags.pictures.split(",")):
        video_llm.IMAGES_PER_DEVICE = pictures
        program = compile_encode(model_settings(config), base, host, chip, len(host), None)
        sizes = f"{program.seconds:.3f}", f"{program.temporaries / 2**30:.2f}"
        print(table_row((pictures, *sizes), columns), flush=True)


if __name__ == "__main__":
    run(main)
