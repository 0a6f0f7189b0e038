"""The proxies that turnout is measured beside: nginx as one would set it up for token streams, and vllm-router."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import report
from processes import Process, accepts, free_port

if TYPE_CHECKING:
    from pathlib import Path

VLLM_ROUTER = "0.1.17"
_ENVIRONMENT = report.ROOT / ".cache" / "bench-venv"

#: One worker process on one core, no access log, kept-alive upstream connections that are never retired, tokens passed
#: on at once (proxy_buffering off). Two servers: one for each kind of upstream.
_NGINX = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 32m;
    client_body_buffer_size 1m;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    tcp_nodelay on;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_buffering off;
    proxy_read_timeout 600s;
    upstream tcp {{ server 127.0.0.1:{upstream_port}; keepalive 512; keepalive_requests 1000000000; }}
    upstream unix {{ server unix:{upstream_socket}; keepalive 512; keepalive_requests 1000000000; }}
    server {{ listen 127.0.0.1:{tcp_port} backlog=4096; location / {{ proxy_pass http://tcp; }} }}
    server {{ listen 127.0.0.1:{unix_port} backlog=4096; location / {{ proxy_pass http://unix; }} }}
}}
"""


class Nginx:
    """A running nginx. ``tcp_port`` leads to the upstream's port, ``unix_port`` to its socket."""

    def __init__(self, folder: Path, core: int, upstream_port: int, upstream_socket: Path) -> None:
        self.tcp_port, self.unix_port = free_port(), free_port()
        folder.mkdir()
        config = folder / "nginx.conf"
        config.write_text(
            _NGINX.format(
                user="user root;" if os.geteuid() == 0 else "",  # else the workers could not open the socket
                folder=folder,
                upstream_port=upstream_port,
                upstream_socket=upstream_socket,
                tcp_port=self.tcp_port,
                unix_port=self.unix_port,
            )
        )
        argv = [nginx_path() or "nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]
        self.process = Process(argv, folder / "log", core=core)
        self.process.wait_for(lambda: accepts(self.tcp_port) and accepts(self.unix_port), "nginx")


class VllmRouter:
    """A running vllm-router with one worker."""

    def __init__(self, folder: Path, core: int, upstream_port: int) -> None:
        self.port = free_port()
        folder.mkdir()
        argv = [
            *(str(_ENVIRONMENT / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--worker-urls", f"http://127.0.0.1:{upstream_port}", "--policy", "round_robin", "--log-level", "error"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        ]
        self.process = Process(argv, folder / "log", core=core, cwd=folder)
        self.process.wait_for(lambda: accepts(self.port), "vllm-router")


def nginx_path() -> str | None:
    """Where nginx is; None where it is not installed."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def nginx_version() -> str:
    """Version of the installed nginx; empty where there is none."""
    path = nginx_path()
    if path is None:
        return ""
    said = subprocess.run([path, "-v"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"nginx/(\S+)", said)
    return found[1] if found else said.strip()


def install_vllm_router() -> bool:
    """Put vllm-router into an environment of its own in .cache, once. False where that can't be done."""
    if (_ENVIRONMENT / "installed").exists():
        return True
    print(f"installing vllm-router {VLLM_ROUTER} into .cache/bench-venv", file=sys.stderr)
    pip = [str(_ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "-qq", f"vllm-router=={VLLM_ROUTER}"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(_ENVIRONMENT)], check=True)
        subprocess.run(pip, check=True)
    except subprocess.CalledProcessError as e:
        print(f"vllm-router can't be installed: {e}", file=sys.stderr)
        return False
    (_ENVIRONMENT / "installed").touch()
    return True
