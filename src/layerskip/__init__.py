"""LayerSkip: early-exit training and exact self-speculative decoding.

The public face. Names load on first use (PEP 562), so that ``import layerskip`` loads neither torch nor
transformers. What is not in ``__all__`` is not public.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Assistant",
    "Auto",
    "CapacityError",
    "Cascade",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Drafter",
    "EarlyExit",
    "ExitScore",
    "LayerSkipError",
    "Lookup",
    "NumericalError",
    "RequestError",
    "Sampling",
    "Stream",
    "TokenLogprob",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.decode.drafters import Assistant, Auto, Cascade, EarlyExit, Lookup
    from layerskip.decode.logprobs import TokenLogprob
    from layerskip.decode.sampling import Sampling
    from layerskip.decode.scoring import ExitScore
    from layerskip.errors import CapacityError, CheckpointError, LayerSkipError, NumericalError, RequestError
    from layerskip.llm import LLM, Chunk, Completion, Stream, load
else:
    # In the else branch, so that a type checker still reports a name that does not exist.
    _HOME = {
        "LLM": "layerskip.llm",
        "Chunk": "layerskip.llm",
        "Completion": "layerskip.llm",
        "Stream": "layerskip.llm",
        "load": "layerskip.llm",
        "Sampling": "layerskip.decode.sampling",
        "Drafter": "layerskip.decode.draft",
        "ExitScore": "layerskip.decode.scoring",
        "TokenLogprob": "layerskip.decode.logprobs",
        "Assistant": "layerskip.decode.drafters",
        "Auto": "layerskip.decode.drafters",
        "Cascade": "layerskip.decode.drafters",
        "EarlyExit": "layerskip.decode.drafters",
        "Lookup": "layerskip.decode.drafters",
        "CapacityError": "layerskip.errors",
        "CheckpointError": "layerskip.errors",
        "LayerSkipError": "layerskip.errors",
        "NumericalError": "layerskip.errors",
        "RequestError": "layerskip.errors",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value  # found directly from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
