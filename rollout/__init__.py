"""Sampling from the policy: KV cache, batching, scheduling, weight hand-over. Start reading at sampler.py."""

from rollout.choice import SamplingParams
from rollout.collect import Collector
from rollout.experience import Experience, evaluate
from rollout.sampler import Request, Rollout, Sampler

__all__ = ["Collector", "Experience", "Request", "Rollout", "Sampler", "SamplingParams", "evaluate"]
