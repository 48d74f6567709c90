"""What proposes tokens, one file per drafter. All of them are exact: they change speed, never the law of the text."""

from layerskip.decode.drafters.assistant import Assistant
from layerskip.decode.drafters.auto import Auto
from layerskip.decode.drafters.cascade import Cascade
from layerskip.decode.drafters.early_exit import EarlyExit
from layerskip.decode.drafters.lookup import Lookup

__all__ = ["Assistant", "Auto", "Cascade", "EarlyExit", "Lookup"]
