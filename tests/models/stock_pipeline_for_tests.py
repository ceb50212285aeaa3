"""Run in a process of its own: sample from a model directory with stock diffusers alone.

Arguments: model directory, safetensors with "noise" and "labels", output, guidance scale, steps.
"""

from __future__ import annotations

import sys


class NoDpldm:
    """Makes ``import dpldm_dist`` fail, whatever the path."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dpldm_dist":
            raise ImportError("dpldm_dist cannot be imported here")


sys.meta_path.insert(0, NoDpldm())

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file


def main(folder: str, inputs: str, output: str, guidance_scale: str, steps: str) -> None:
    given = load_file(inputs)
    rows = load_file(f"{folder}/conditioning/rows.safetensors")["rows"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt_embeds=rows[given["labels"]],
        negative_prompt_embeds=rows[-1:].expand(len(given["labels"]), -1, -1),
        latents=given["noise"],
        num_inference_steps=int(steps),
        guidance_scale=float(guidance_scale),
        output_type="pt",
    ).images
    assert "dpldm_dist" not in sys.modules
    save_file({"images": images.contiguous()}, output)


main(*sys.argv[1:])
