"""lm-evaluation-harness on this package's models: its tasks, its metrics, our decoding.

    run(LayerSkipLM(llm, exit=8), open_tasks(["arc_easy"]), name="exit 8") -> Outcome

Needs the package lm-eval; nothing outside this folder imports it.
"""

from layerskip.errors import RequestError

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as error:
    raise RequestError("lm-evaluation-harness is not installed; pip install 'layerskip[eval]'") from error

from layerskip.evaluate.harness.model import LayerSkipLM
from layerskip.evaluate.harness.tasks import Opened, Outcome, open_tasks, run

__all__ = ["LayerSkipLM", "Opened", "Outcome", "open_tasks", "run"]
