"""Sampling from the policy: KV cache, batching, scheduling, weight hand-over. Start reading at sampler.py."""

from rollout.ahead import Sampling
from rollout.choice import SamplingParams
from rollout.collect import Collector, Drawn
from rollout.experience import Experience, evaluate, experience_of, minibatches
from rollout.groups import sample_groups
from rollout.identities import check_ratio, check_sampler
from rollout.report import held_out_accuracy, of_responses, of_sampler, of_sampling
from rollout.rewards import check_form
from rollout.sampler import Request, Rollout, Sampler

__all__ = [
    "Collector",
    "Drawn",
    "Experience",
    "Request",
    "Rollout",
    "Sampler",
    "Sampling",
    "SamplingParams",
    "check_form",
    "check_ratio",
    "check_sampler",
    "evaluate",
    "experience_of",
    "held_out_accuracy",
    "minibatches",
    "of_responses",
    "of_sampler",
    "of_sampling",
    "sample_groups",
]
