"""Who is connected to an engine, from the kernel's tables."""

from __future__ import annotations

from turnout.workers.inference.quiet import REQUESTS, tcp_connections, total, unix_connections

UNIX = """\
0000000000000000: 00000002 00000000 00010000 0001 01 51001 /run/i 1.sock
0000000000000000: 00000003 00000000 00000000 0001 03 51002 /run/i 1.sock
0000000000000000: 00000003 00000000 00000000 0001 03 51003
0000000000000000: 00000002 00000000 00000000 0001 02 51004 /run/i 1.sock
0000000000000000: 00000003 00000000 00000000 0001 03 51005 /run/i 1.sock.shut
0000000000000000: 00000003 00000000 00000000 0001 03 51006 /run/i 2.sock
""".splitlines()

TCP = """\
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:1F40 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100007F:C350 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0        0 3
   3: 0100007F:1F40 0100007F:C351 06 00000000:00000000 00:00000000 00000000     0        0 4
   4: 0100007F:1F40 0100007F:C352 08 00000000:00000000 00:00000000 00000000     0        0 5
   5: 0100007F:1F41 0100007F:C353 01 00000000:00000000 00:00000000 00000000     0        0 6
""".splitlines()


def test_accepted_and_waiting_connections_of_the_path_count_and_the_listener_does_not() -> None:
    assert unix_connections(UNIX, "/run/i 1.sock") == 2


def test_a_port_counts_what_is_open_or_half_closed_by_the_client() -> None:
    assert tcp_connections(TCP, 8000) == 2


def test_running_and_waiting_requests_add_up_over_all_labels() -> None:
    metrics = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="a b"} 2.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="a}b"} 1.0\n'
        'vllm:num_requests_waiting_by_reason{reason="capacity"} 1.0\n'
        'vllm:prompt_tokens_total{engine="0"} 99.0\n'
    )
    assert total(metrics, REQUESTS) == 3.0
