"""Stable Diffusion's pipeline of diffusers with a solver table: K points of an interval in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from solver_utils import SolverError, check_options
from training.denoisers import ModelError, TextCond
from training.diffusers_plugin.scheduler import EPDScheduler
from training.table_hub import Source


def apply_epd(pipe: StableDiffusionPipeline, table: Source, *, max_rows: int | None = None) -> EPDPipeline:
    """A pipeline of the same components as `pipe` that samples with `table`; `pipe` itself stays as it is.

    table     a SolverTable or EPDTable, or the name of one as in `EPDTable.from_pretrained`: a folder, a file, a run's
              folder, or owner/name[@revision] of the hub.
    max_rows  at most so many rows of latents at a time go through the network, twice as many with guidance; None: the
              K points of all images at once. It changes the memory that is needed, not the images.

    What was loaded into or set on `pipe` (LoRA, offloading, slicing, progress bar) counts for both. Raises a
    `UserError` of one line for another kind of pipeline or a table that cannot be used.
    """
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ModelError(f"apply_epd takes a StableDiffusionPipeline, not {type(pipe).__name__}")
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ModelError("the UNet is told its guidance (time_cond_proj_dim), which no solver table is made for")
    check_options("epd", {"max_rows": max_rows})
    scheduler = EPDScheduler.from_table(table, pipe.scheduler.config)
    epd = EPDPipeline.__new__(EPDPipeline)
    epd.__dict__.update(vars(pipe))
    epd.register_modules(scheduler=scheduler)
    epd.max_rows = max_rows
    return epd


class EPDPipeline(StableDiffusionPipeline):
    """Stable Diffusion sampled by EPD-Solver (arXiv 2507.14797); its scheduler is an EPDScheduler, which has the table.

    `apply_epd` makes it. All of `StableDiffusionPipeline` is there: prompts, loading of LoRA and textual inversion,
    offloading, slicing, safety checker. IP adapters are not.
    """

    max_rows: int | None = None  # see apply_epd

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Images of prompts. Arguments are those of `StableDiffusionPipeline`, except:

        num_inference_steps   the table's number of intervals, or None for it; another is a `SolverError`.
        guidance_scale        None is the guidance that the table was made for; 1 and below is none.
        callback_on_step_end  called after each of the table's intervals, as (pipeline, interval, timestep of its node,
                              tensors); it may return tensors to go on with, and set `pipeline._interrupt` to stop.

        Latents are data + sigma noise: `latents` are standard normal at first and those of a callback have the noise
        level of the interval's end. `output_type="latent"` returns them in the UNet's dtype.
        """
        if not isinstance(self.scheduler, EPDScheduler):
            raise ModelError(f"the scheduler is a {type(self.scheduler).__name__}; apply_epd puts in the one needed")
        device = self._execution_device
        scheduler, table = self.scheduler, self.scheduler.solver_table
        scheduler.set_timesteps(num_inference_steps, device)
        if guidance_scale is None:
            guidance_scale = table.guidance_rate
            if guidance_scale < 1:
                raise SolverError(
                    f"the table is made for guidance {guidance_scale:g}, below 1, which diffusers' pipelines take for "
                    "none; pass a guidance_scale"
                )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        height, width = height or rows * self.vae_scale_factor, width or columns * self.vae_scale_factor
        self.check_inputs(
            prompt,
            height,
            width,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        shape = len(prompt_embeds), self.unet.config.in_channels, height, width
        latents = self.prepare_latents(*shape, self.unet.dtype, device, generator, latents)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        net = GuidedUNet(self, device)
        steps = scheduler.steps(latents, max_rows=self.max_rows)
        times = scheduler.noise.timestep(scheduler.nodes).to(device)
        self._num_timesteps = scheduler.num_inference_steps
        with self.progress_bar(total=self._num_timesteps) as progress:
            for i in range(self._num_timesteps):
                branches = 2 if self.do_classifier_free_guidance else 1
                cond = TextCond(torch.stack(prompt_embeds.chunk(branches), dim=1))
                latents = steps.step(net, i, latents, cond)
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, times[i], shown) or {}
                    latents, prompt_embeds = tensors["latents"], tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                progress.update()
                if self.interrupt:
                    break

        if output_type == "latent":
            images, flagged = latents.to(self.unet.dtype), None
        else:
            scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            images = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
            images, flagged = self.run_safety_checker(images, device, prompt_embeds.dtype)
        denormalize = [not flag for flag in flagged] if flagged is not None else [True] * len(images)
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalize)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, flagged) if return_dict else (images, flagged)


class GuidedUNet:
    """The pipeline's UNet with its guidance as the `net` of solvers.

    A condition holds the embeddings of all branches of a row: `TextCond` of `[B, 2, length, width]`, the negative
    prompts first, or `[B, 1, length, width]` without guidance.
    """

    is_flow = False

    def __init__(self, pipe: EPDPipeline, device: torch.device):
        self.pipe = pipe
        self.noise = copy.copy(pipe.scheduler.noise).to(device)

    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        """dx/dsigma at `x [B, C, H, W]` and `sigma` (0-dim or `[B]`, float64), in the dtype of x."""
        pipe, branches = self.pipe, cond.text.shape[1]
        sigma = sigma.expand(len(x))
        output = pipe.unet(
            self.noise.seen(x, sigma).to(pipe.unet.dtype).repeat(branches, 1, 1, 1),
            self.noise.timestep(sigma).repeat(branches),
            encoder_hidden_states=cond.text.transpose(0, 1).flatten(0, 1).to(pipe.unet.dtype),
            cross_attention_kwargs=pipe.cross_attention_kwargs,
            return_dict=False,
        )[0].to(x.dtype)
        if branches == 2:
            negative, positive = output.chunk(2)
            output = negative + pipe.guidance_scale * (positive - negative)
            if pipe.guidance_rescale > 0:
                output = rescale_noise_cfg(output, positive, pipe.guidance_rescale)
        return self.noise.slope(output, x, sigma)
