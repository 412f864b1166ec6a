"""A worker of Flink never waits for Flink to take its output, and hands over all of it in the end."""

import subprocess
import sys

from flink_cluster import ROOT

# A runner that takes nothing before all is written, as Flink does once a hundred messages wait there.
SCRIPT = """
import hashlib, sys, threading
import grpc
from apache_beam.portability.api import beam_fn_api_pb2_grpc
from apache_beam.runners.worker import data_plane
from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

if sys.argv[1] == "with":
    import pipeline.flink_worker
data_plane._DEFAULT_SEND_QUEUE_MAX_BYTES = 1 << 20  # Beam's own bounds, made small.
written, done, taken = threading.Event(), threading.Event(), []

class Runner(beam_fn_api_pb2_grpc.BeamFnDataServicer):
    def Data(self, messages, context):
        written.wait()
        for elements in messages:
            taken.extend(elements.data)
            if elements.data[-1].is_last:
                done.set()
                return
            yield from ()

server = grpc.server(shared_unbounded_instance())
beam_fn_api_pb2_grpc.add_BeamFnDataServicer_to_server(Runner(), server)
address = f"localhost:{server.add_insecure_port('localhost:0')}"
server.start()
channel = data_plane.GrpcClientDataChannel(beam_fn_api_pb2_grpc.BeamFnDataStub(grpc.insecure_channel(address)))
output = channel.output_stream("bundle", "step")
data = [bytes([number]) * 700_000 for number in range(100)]

def write():
    for part in data:
        output.write(part)
        output.maybe_flush()
    output.close()
    written.set()

threading.Thread(target=write, daemon=True).start()
if not written.wait(20 if sys.argv[1] == "with" else 5):
    print("waits for ever", flush=True)
    __import__("os")._exit(0)
done.wait(60)
same = b"".join(one.data for one in taken) == b"".join(data)
print("whole" if same else "not whole", max(len(one.data) for one in taken), flush=True)
__import__("os")._exit(0)
"""


def run(which: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, which], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_output_waits_on_disk_until_it_is_taken():
    assert run("with") == "whole 1400000"


def test_without_it_a_worker_waits_for_ever():
    """Where this fails, Beam has mended it, and pipeline/flink_worker.py can go."""
    assert run("without") == "waits for ever"
