"""How long a step takes in each of its phases."""

import time

PHASES = ("forward", "backward", "optimizer")
"""the last: reduction of gradients, clipping and the update"""


class PhaseClock:
    """Seconds in each phase by the clock of the host: a device works behind it.

    Listens to a `Progress`; `stop` ends the phase that a step ended in.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._since = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def mark(self, section: str, phase: str) -> None:
        """A phase begins, and the one before it ends, where the mark names one."""
        if section == "step" and phase:
            self.stop()
            self._phase = phase if phase in PHASES else ""

    def stop(self) -> None:
        """No phase goes on."""
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = "", now

    def take(self) -> dict[str, float]:
        """The seconds so far, and begin anew."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken
