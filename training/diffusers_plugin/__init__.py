"""Solver tables inside diffusers: a pipeline (`apply_epd`), a scheduler, and tables as folders and on the hub."""

from __future__ import annotations

from training.diffusers_plugin.pipeline import EPDPipeline, apply_epd
from training.diffusers_plugin.scheduler import EPDScheduler, EPDSchedulerOutput
from training.table_hub import EPDTable

__all__ = ["EPDPipeline", "EPDScheduler", "EPDSchedulerOutput", "EPDTable", "apply_epd"]
