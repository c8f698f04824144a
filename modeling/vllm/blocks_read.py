"""How much of the cache decoding reads, which pruning lowers: counted by the kernels, logged by each worker of vLLM."""

import time

import torch
from vllm import envs
from vllm.logger import init_logger

# Beneath vLLM's own logger, which has the handlers and the level.
logger = init_logger("vllm.foxlm")


class BlocksRead:
    """Blocks of 64 keys of a key/value head that decoding has read, and those that it would read without pruning.

    Every ``VLLM_LOG_STATS_INTERVAL`` seconds (10 by default) in which something was decoded it logs both in bytes.

    Args:
        block_bytes: of a block's keys, values and gate sums.
        device: a GPU.

    Attributes:
        counts: ``[2]`` int64 on the device, for `CacheView.counts`: of all layers, heads and requests so far.
    """

    def __init__(self, block_bytes: int, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._block_bytes = block_bytes
        self._host = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._logged, self._since = [0, 0], time.monotonic()

    def look(self) -> None:
        """Log what is due; called before each step, and does not wait for the device."""
        if torch.cuda.is_current_stream_capturing():
            return
        now = time.monotonic()
        if self._copied is None:
            if now - self._since >= envs.VLLM_LOG_STATS_INTERVAL:
                self._host.copy_(self.counts, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
        elif self._copied.query():
            self._log(self._host.tolist(), now)
            self._copied = None

    def _log(self, counted: list[int], now: float) -> None:
        read, there = (x - before for x, before in zip(counted, self._logged, strict=True))
        if there:
            logger.info(
                "FoX: in %.1f s decoding read %.3f GB of the cache, %.1f%% of the %.3f GB that its requests hold",
                now - self._since,
                read * self._block_bytes / 1e9,
                100.0 * read / there,
                there * self._block_bytes / 1e9,
            )
        self._logged, self._since = counted, now
