"""An async reward function of the user's own: it scores a whole batch, so that its failure is that of all rows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from grpo_autotune.errors import AutotuneError
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.counts import Remote


class OwnReward(Remote):
    """The function, timed. Where it `may_fail`, it has a deadline, and an error of its is no end of the run."""

    def __init__(self, function: Callable[..., Any], name: str, deadline_s: float | None, *, may_fail: bool) -> None:
        super().__init__()
        self.set_up(name, "", None, deadline_s)
        self._function, self._may_fail = function, may_fail

    async def __call__(self, **batch: Any) -> Any:
        """What the function returns, or `FAILED` for each row."""
        rows, begin_s = len(batch["completions"]), self.clock()
        self.counts.calls += 1
        with self._batch(rows):
            try:
                async with asyncio.timeout(self._batch_limit_s() if self._may_fail else None) as limit:
                    values = await self._function(**batch)
                self._took_s.append(self.clock() - begin_s)
                return values
            except AutotuneError:
                raise
            except Exception as error:
                if not self._may_fail:
                    raise
                kind = "deadline" if limit.expired() else type(error).__name__
                self._failed(Counter({kind: rows}), rows, str(error))
                return [FAILED] * rows
            finally:
                self._called(self.clock() - begin_s)
