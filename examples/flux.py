"""One image from FLUX, its tokens spread over all ranks.

    torchrun --nproc-per-node 4 examples/flux.py                                a tiny random FLUX, on CPUs
    torchrun --nproc-per-node 4 examples/flux.py --ulysses 4                    the same image on another mesh
    python examples/flux.py                                                     and on one rank
    torchrun --nproc-per-node 4 examples/flux.py --weights black-forest-labs/FLUX.1-dev --ulysses 2

The picture is 1008 x 1008 pixels by default: 63 x 63 image tokens beside 512 of text, 4481 rows, which no
number of ranks divides. Every rank makes the same call and ends with the same image; rank 0 writes it. With
`--weights` the pipeline is loaded from the Hugging Face hub, or a folder, and runs in bf16 on a GPU a rank.
"""

import argparse
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from seqmesh import SequenceMesh
from seqmesh.integrations.diffusers import plug_in

TEXT_TOKENS = 512
TEXT_CHANNELS = 32


def tiny_pipeline() -> FluxPipeline:
    """FLUX with random weights, one block of each kind and three heads; without text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=TEXT_CHANNELS,
        axes_dims_rope=[4, 6, 6],
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )


def tiny_prompt() -> dict[str, Any]:
    """What text encoders would give: random, the same on every rank."""
    make = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_CHANNELS, generator=make),
        "pooled_prompt_embeds": torch.randn(1, TEXT_CHANNELS, generator=make),
    }


def start(arguments: argparse.Namespace) -> torch.device:
    """This rank's device, and the process group under torchrun."""
    device = torch.device("cpu")
    if arguments.weights:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if arguments.weights else "gloo", timeout=timedelta(minutes=5))
    return device


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ulysses", type=int, default=None, help="default: 2 if the ranks allow it")
    parser.add_argument("--weights", default="", help="a FLUX.1 on the hub, or a folder; default: a tiny one")
    parser.add_argument("--prompt", default="a red fox in the snow, at dawn")
    parser.add_argument("--height", type=int, default=1008)
    parser.add_argument("--width", type=int, default=1008)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", default="flux.png")
    return parser.parse_args()


def main() -> None:
    """Make one image and write it."""
    arguments = read_arguments()
    device = start(arguments)
    world = dist.get_world_size() if dist.is_initialized() else 1
    ulysses = arguments.ulysses or (2 if world % 2 == 0 else 1)
    mesh = SequenceMesh.build(ulysses=ulysses, ring=world // ulysses)
    if arguments.weights:
        pipe = FluxPipeline.from_pretrained(arguments.weights, torch_dtype=torch.bfloat16).to(device)
        prompt: dict[str, Any] = {"prompt": arguments.prompt}
    else:
        pipe = tiny_pipeline()
        prompt = tiny_prompt()
    pipe.set_progress_bar_config(disable=True)

    plug_in(pipe.transformer, mesh)
    image = pipe(
        **prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),  # the same noise on every rank
    ).images[0]

    if mesh.rank == 0:
        image.save(arguments.out)
        print(f"{arguments.out}: {image.width} x {image.height} pixels, ring {mesh.ring} x ulysses {ulysses}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
