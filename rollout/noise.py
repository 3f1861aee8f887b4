"""Gumbel noise that is a function of its name, so that a token does not depend on the batch it was sampled in.

    key      = blake2b(seed, 'rollout', step, example, sample)                     one per response, on the host
    h_t      = mix(key + (t + 1) phi)                                    one per token, t counts response tokens
    u_ti     = (mix(h_t + (i + 1) phi) >> 11 + 1/2) / 2^53               i: the index that the noise belongs to
    gumbel   = -log(-log u)

mix is the finaliser of SplitMix64 and phi its increment: position i of the stream seeded with h_t. All arithmetic is
modulo 2^64 in int64 tensors (which wrap), so CPU and CUDA agree to the bit; the two logarithms are float64, and so few
(see choice.py) that this costs nothing.

A tokens sampled at once · I indices.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

PHI = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit number, like the multipliers
MULTIPLIER_1, MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def response_key(seed: int, step: int, example: int, sample: int) -> int:
    """The signed 64-bit name of one response's noise. Example: response_key(0, 0, 0, 0) is the same on every
    machine.
    """
    name = f"{seed}/rollout/{step}/{example}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def gumbel(keys_A: Tensor, positions_A: Tensor, indices_AI: Tensor) -> Tensor:
    """Standard Gumbel noise, (A, I) float64, for token `positions_A` of the responses `keys_A` and the given indices.

    All arguments int64; `indices_AI` may be (I,) or (1, I). A pure function of its arguments, independent over all of
    them. Source: Steele, Lea & Flood 2014, 'Fast splittable pseudorandom number generators' (SplitMix64).
    """
    stream_A1 = _mix(keys_A + (positions_A + 1) * PHI)[:, None]
    bits_AI = _mix(stream_A1 + (indices_AI + 1) * PHI)
    uniform_AI = (_shifted(bits_AI, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform_AI))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * MULTIPLIER_1
    x = (x ^ _shifted(x, 27)) * MULTIPLIER_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's own copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
