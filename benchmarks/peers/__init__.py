"""The engines that are measured beside each other, each in one file with the interface of `peer.Peer`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.peers.peer import FLOATS, QUANTISED, Draft, Peer, PeerRun

__all__ = ["FLOATS", "OWN", "PEERS", "QUANTISED", "Draft", "Peer", "PeerRun", "peer"]

OWN = "layerskip"
PEERS = (OWN, "transformers", "llama.cpp", "openvino-genai", "onnxruntime-genai")
"""By the names that reports use; ours first."""


def peer(name: str) -> Peer:
    """The engine of a name, its package not yet imported."""
    from benchmarks.peers.llama_cpp import LlamaCpp
    from benchmarks.peers.onnx_genai import OnnxGenAI
    from benchmarks.peers.openvino import OpenVino
    from benchmarks.peers.own import Own
    from benchmarks.peers.transformers import Transformers

    made: dict[str, Callable[[], Peer]]
    made = dict(zip(PEERS, (Own, Transformers, LlamaCpp, OpenVino, OnnxGenAI), strict=True))
    return made[name]()
