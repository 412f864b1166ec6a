"""Lets what a worker has made for Flink wait on its own disk; workers import it, as a Beam plugin, before they begin.

Flink makes one bundle of a whole partition, and Beam's runner hands over all of its input before it takes more than a
hundred messages of what the worker makes of it:
https://github.com/apache/beam/blob/v2.62.0/sdks/java/fn-execution/src/main/java/org/apache/beam/sdk/fn/data/BeamFnDataInboundObserver.java
A worker that waits until it can pass on its output takes no more input. So both would wait for ever, once there is a
gigabyte of output: seen with 600,000 vectors in one partition.
"""

import logging
from typing import Any

from apache_beam.runners.worker import data_plane

from transforms.spilling_queue import SpillingQueue

MESSAGE_BYTES = 1 << 20
"""From this size on a message is sent; a hundred wait in Flink's heap for each slot. Beam's own size is 10 MiB."""

MAX_MEMORY_BYTES = 32 << 20
"""Of what waits to be sent, in memory; more waits on disk."""

_LOGGER = logging.getLogger(__name__)


def _install() -> None:
    """Changes Beam's channel for data between worker and runner, in this process.

    Raises:
      RuntimeError: Beam's channel is not as it was in the version that this was made for.
    """
    channel: Any = data_plane._GrpcDataChannel
    start_forwarder, output_stream = (
        getattr(channel, name, None) for name in ("_start_send_forwarder", "output_stream")
    )
    if start_forwarder is None or output_stream is None or not hasattr(data_plane, "_DEFAULT_SIZE_FLUSH_THRESHOLD"):
        raise RuntimeError(
            "this version of Apache Beam hands data over in another way than 2.77, and large jobs could hang on "
            "Flink: install the version in constraints.txt"
        )

    def start_forwarder_of_spilling_queue(self: Any) -> None:
        self._pending_send = SpillingQueue(MAX_MEMORY_BYTES)
        start_forwarder(self)

    def stream_of_small_messages(self: Any, *args: Any) -> Any:
        stream = output_stream(self, *args)
        stream._size_flush_threshold = MESSAGE_BYTES
        return stream

    channel._start_send_forwarder = start_forwarder_of_spilling_queue
    channel.output_stream = stream_of_small_messages
    data_plane._DEFAULT_SIZE_FLUSH_THRESHOLD = MESSAGE_BYTES  # To which messages are put together.
    _LOGGER.info("outputs wait on disk until Flink takes them")


_install()
