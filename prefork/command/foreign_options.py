"""Options and worker classes of other servers, and what prefork has in their place. The documentation is made of this.

`ACCEPTED` are other names for options of prefork, which mean the same. `REFUSED` are options that prefork does not
have: the command says what to type, or why there is none. A name that several servers have with several meanings has a
row for each.
"""

from typing import NamedTuple

GUNICORN, UVICORN, FLASK, UWSGI, HTTP_SERVER = "gunicorn", "uvicorn", "flask run", "uWSGI", "python -m http.server"


class ForeignOption(NamedTuple):
    """One option of another server.

    Parameters
    ----------
    names
        As they are typed.
    whose
        The servers that have it.
    instead
        What to type; "": prefork has none.
    why
        Why there is none, or what differs.
    """

    names: tuple[str, ...]
    whose: tuple[str, ...]
    instead: str
    why: str = ""


class ForeignClass(NamedTuple):
    """A worker class of another server."""

    names: tuple[str, ...]
    instead: str
    why: str = ""


ACCEPTED = (
    ForeignOption(("--keep-alive",), (GUNICORN,), "--keepalive-timeout"),
    ForeignOption(("--access-logfile",), (GUNICORN,), "--access-log"),
    ForeignOption(("--worker-connections",), (GUNICORN,), "--max-connections"),
)

_PROXY = "prefork speaks no TLS; let a proxy such as nginx speak it"
_RELOAD = "to load new code type kill -HUP PID; the log says the pid"
_LIFE = "a service manager such as systemd starts it, restarts it and knows its pid"
_DAEMON = "a daemon hides how it fails; use a service manager such as systemd, or: nohup prefork ... &"
_STDERR = "the log goes to standard error; add 2>> FILE"
_USER = "start it as that user: User= of systemd, or setpriv(1)"
_PROXY_HEADERS = "with the worker class asgi set FORWARDED_ALLOW_IPS in the environment"
_BACKLOG = "a server class sets request_queue_size (default: 1024)"
_EACH_IMPORTS = "each worker imports the program, so that kill -HUP PID loads new code"
_UVICORN_OPTIONS = "a subclass of prefork.ASGIWorker sets uvicorn_options"
_WSGI_LIMITS = "a subclass of prefork.WSGIWorker sets the limits of a request"
_FILE = "options are typed, or set by a server class; there is no file for them"

REFUSED = (
    # -- program and address
    ForeignOption(("--host",), (UVICORN, FLASK), "-b HOST:PORT"),
    ForeignOption(("--port",), (UVICORN, FLASK), "-b PORT or -b HOST:PORT"),
    ForeignOption(("-p",), (FLASK,), "-b PORT or -b HOST:PORT"),
    ForeignOption(("--http",), (UVICORN,), "", "leave it out: httptools parses"),
    ForeignOption(("--uds",), (UVICORN,), "-b unix:PATH"),
    ForeignOption(("--fd",), (UVICORN,), "", "prefork binds its sockets itself; type -b HOST:PORT or -b unix:PATH"),
    ForeignOption(("--http", "--http-socket"), (UWSGI,), "-b HOST:PORT", "the worker class is found, or -k"),
    ForeignOption(("--socket", "-s"), (UWSGI,), "-b unix:PATH", "it speaks HTTP: in nginx write proxy_pass"),
    ForeignOption(("--https", "--https-socket"), (UWSGI,), "", _PROXY),
    ForeignOption(("--app", "-A"), (FLASK,), "prefork MODULE:NAME"),
    ForeignOption(("--module", "--wsgi", "--callable"), (UWSGI,), "prefork MODULE:NAME"),
    ForeignOption(("--wsgi-file", "--file"), (UWSGI,), "prefork MODULE", "without the folder and without .py"),
    ForeignOption(("--factory",), (UVICORN,), "prefork MODULE:NAME", "a factory is called"),
    ForeignOption(("--interface",), (UVICORN,), "-k wsgi or -k asgi"),
    ForeignOption(("--app-dir",), (UVICORN,), "--chdir DIR"),
    ForeignOption(("--chdir2",), (UWSGI,), "--chdir DIR"),
    ForeignOption(("--pythonpath", "--python-path", "--pp"), (GUNICORN, UWSGI), "--chdir DIR", "or set PYTHONPATH"),
    ForeignOption(
        ("--directory", "-d"), (HTTP_SERVER,), "--chdir DIR", "prefork http.server:SimpleHTTPRequestHandler serves it"
    ),
    ForeignOption(("--protocol",), (HTTP_SERVER,), "", "a handler class sets protocol_version"),
    ForeignOption(("--cgi",), (HTTP_SERVER,), "", "name the handler: prefork http.server:CGIHTTPRequestHandler"),
    ForeignOption(("--paste", "--paster"), (GUNICORN, UWSGI), "", "write a function that loads it, and name that"),
    ForeignOption(("--mount",), (UWSGI,), "", "let the application or the proxy choose by path"),
    ForeignOption(("--static-map",), (UWSGI,), "", "let the proxy serve files, or an application such as whitenoise"),
    ForeignOption(("--backlog", "--listen"), (GUNICORN, UVICORN, UWSGI), "", _BACKLOG),
    ForeignOption(("--reuse-port",), (GUNICORN, UWSGI), "", "a server class sets allow_reuse_port"),
    ForeignOption(("--umask", "-m"), (GUNICORN, UWSGI), "--unix-mode MODE", "for the file of a Unix socket"),
    ForeignOption(("--chmod-socket",), (UWSGI,), "--unix-mode MODE"),
    ForeignOption(("--chown-socket",), (UWSGI,), "--unix-group GROUP"),
    ForeignOption(("--proxy-protocol",), (GUNICORN,), "", "prefork does not read the PROXY protocol"),
    ForeignOption(("--proxy-headers", "--no-proxy-headers", "--forwarded-allow-ips"), (UVICORN,), "", _PROXY_HEADERS),
    ForeignOption(("--root-path",), (UVICORN,), "", _UVICORN_OPTIONS),
    ForeignOption(
        ("--certfile", "--keyfile", "--ca-certs", "--ciphers", "--cert-reqs", "--do-handshake-on-connect"),
        (GUNICORN,), "", _PROXY,
    ),
    ForeignOption(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-keyfile-password", "--ssl-version", "--ssl-cert-reqs",
         "--ssl-ca-certs", "--ssl-ciphers"),
        (GUNICORN, UVICORN), "", _PROXY,
    ),
    ForeignOption(("--cert", "--key"), (FLASK,), "", _PROXY),
    ForeignOption(("--tls-cert", "--tls-key", "--tls-password-file"), (HTTP_SERVER,), "", _PROXY),
    # -- workers
    ForeignOption(("--processes", "-p"), (UWSGI,), "-w N"),
    ForeignOption(("--cheaper",), (UWSGI,), "", "kill -TTIN PID and kill -TTOU PID change the number of workers"),
    ForeignOption(("--with-threads", "--without-threads", "--enable-threads"), (FLASK, UWSGI), "--threads N"),
    ForeignOption(("--preload", "--preload-app"), (GUNICORN,), "", _EACH_IMPORTS),
    ForeignOption(("--lazy-apps", "--lazy"), (UWSGI,), "", f"leave it out: {_EACH_IMPORTS}"),
    ForeignOption(("--master", "-M"), (UWSGI,), "", "leave it out: there is always a master"),
    ForeignOption(
        ("--single-interpreter", "--need-app", "--die-on-term", "--vacuum", "--thunder-lock", "--strict"), (UWSGI,),
        "", "leave it out: prefork always does this",
    ),
    ForeignOption(("--plugin", "--plugins"), (UWSGI,), "", "leave it out: prefork serves Python only"),
    ForeignOption(("--gevent", "--async", "--asyncio"), (UWSGI,), "--threads N", "or an ASGI application"),
    ForeignOption(("--loop",), (UVICORN,), "", "leave it out: uvloop is used where it is installed"),
    ForeignOption(("--ws", "--ws-max-size", "--ws-max-queue", "--ws-ping-interval", "--ws-ping-timeout",
                   "--ws-per-message-deflate", "--lifespan", "--h11-max-incomplete-event-size", "--server-header",
                   "--no-server-header", "--date-header", "--no-date-header", "--header"),
                  (UVICORN,), "", _UVICORN_OPTIONS),
    ForeignOption(("--limit-concurrency",), (UVICORN,), "--max-connections N"),
    ForeignOption(("--worker-tmp-dir", "--no-sendfile"), (GUNICORN,), "", "leave it out: prefork needs none"),
    ForeignOption(("--offload-threads",), (UWSGI,), "", "leave it out: a slow client holds no worker"),
    ForeignOption(("--home", "--virtualenv", "--venv", "-H"), (UWSGI,), "",
                  "start the command of that environment: DIR/bin/prefork"),
    # -- timeouts
    ForeignOption(
        ("--timeout", "-t"), (GUNICORN,), "--request-timeout SECONDS",
        "the time of one request, in every worker class; a worker that does not start: --boot-timeout",
    ),
    ForeignOption(("--harakiri",), (UWSGI,), "--request-timeout SECONDS"),
    ForeignOption(("--timeout-keep-alive",), (UVICORN,), "--keepalive-timeout SECONDS"),
    ForeignOption(("--timeout-graceful-shutdown",), (UVICORN,), "--graceful-timeout SECONDS"),
    ForeignOption(("--timeout-worker-healthcheck",), (UVICORN,), "--request-timeout SECONDS"),
    ForeignOption(("--worker-reload-mercy", "--reload-mercy"), (UWSGI,), "--graceful-timeout SECONDS"),
    ForeignOption(("--http-timeout", "--socket-timeout"), (UWSGI,), "--keepalive-timeout SECONDS"),
    ForeignOption(
        ("--limit-request-line", "--limit-request-fields", "--limit-request-field_size"), (GUNICORN,), "", _WSGI_LIMITS
    ),
    ForeignOption(("--buffer-size", "--post-buffering"), (UWSGI,), "", _WSGI_LIMITS),
    ForeignOption(("--limit-post",), (UWSGI,), "--max-body BYTES"),
    # -- recycling
    ForeignOption(("--limit-max-requests",), (UVICORN,), "--max-requests N"),
    ForeignOption(("--limit-max-requests-jitter",), (UVICORN,), "--max-requests-jitter N"),
    ForeignOption(("--max-worker-lifetime",), (UWSGI,), "--max-lifetime SECONDS"),
    ForeignOption(("--reload-on-rss", "--reload-on-as"), (UWSGI,), "--max-memory BYTES", "such as 512M"),
    # -- development
    ForeignOption(
        ("--reload", "--reload-dir", "--reload-include", "--reload-exclude", "--reload-delay", "--reload-engine",
         "--reload-extra-file", "--no-reload"),
        (GUNICORN, UVICORN, FLASK), "", f"prefork does not watch files; {_RELOAD}",
    ),
    ForeignOption(("--py-autoreload", "--touch-reload"), (UWSGI,), "", f"prefork does not watch files; {_RELOAD}"),
    ForeignOption(("--debug", "--no-debug", "--debugger", "--no-debugger"), (FLASK,), "",
                  "prefork has no debugger; for a log in detail type --log-level debug"),
    ForeignOption(("--extra-files", "--exclude-patterns"), (FLASK,), "", f"prefork does not watch files; {_RELOAD}"),
    ForeignOption(("--check-config", "--print-config", "--spew"), (GUNICORN,), "", "each start and each reload tries "
                  "the program first, and says what is wrong"),
    # -- logs
    ForeignOption(("--error-logfile", "--log-file", "--errorlog"), (GUNICORN,), "", _STDERR),
    ForeignOption(("--logto", "--logto2"), (UWSGI,), "", _STDERR),
    ForeignOption(("--capture-output",), (GUNICORN,), "", "leave it out: nothing that a program prints is moved"),
    ForeignOption(("--access-logformat",), (GUNICORN,), "", "the access log has the combined format"),
    ForeignOption(("--no-access-log",), (UVICORN,), "", "leave it out: only --access-log FILE writes one"),
    ForeignOption(("--disable-logging",), (UWSGI,), "--log-level error"),
    ForeignOption(("--log-config", "--log-config-json", "--logger-class"), (GUNICORN, UVICORN), "",
                  "the log is the logger `prefork` of `logging`; a program that needs another one serves by itself"),
    ForeignOption(("--log-syslog", "--log-syslog-to", "--statsd-host", "--stats", "--statsd-prefix"),
                  (GUNICORN, UWSGI), "", _STDERR),
    ForeignOption(("--use-colors", "--no-use-colors"), (UVICORN,), "", "leave it out: the log has no colours"),
    # -- life
    ForeignOption(("--daemon", "-D"), (GUNICORN,), "", _DAEMON),
    ForeignOption(("--daemonize",), (UWSGI,), "", _DAEMON),
    ForeignOption(("-p",), (GUNICORN,), "", f"the log says the pid; {_LIFE}"),
    ForeignOption(("--pid", "--pidfile"), (GUNICORN, UWSGI), "", f"the log says the pid; {_LIFE}"),
    ForeignOption(("--emperor",), (UWSGI,), "", _LIFE),
    ForeignOption(("--user", "-u", "--group", "-g", "--initgroups", "--uid", "--gid"), (GUNICORN, UWSGI), "", _USER),
    ForeignOption(("--name", "-n", "--procname", "--procname-prefix"), (GUNICORN, UWSGI), "",
                  "leave it out: ps shows program and address"),
    ForeignOption(("--env", "-e"), (GUNICORN, UWSGI), "NAME=VALUE prefork ..."),
    ForeignOption(("--env-file",), (UVICORN, FLASK), "", "set the environment before: set -a; . FILE; prefork ..."),
    ForeignOption(("--config", "-c"), (GUNICORN,), "", _FILE),
    ForeignOption(("--ini", "--yaml", "--json", "--xml"), (UWSGI,), "", _FILE),
)  # fmt: skip

CLASSES = (
    ForeignClass(("gthread",), "-k wsgi --threads N"),
    ForeignClass(
        ("gevent", "eventlet", "tornado", "gevent_wsgi", "gevent_pywsgi"), "-k wsgi --threads N",
        "slow and idle connections hold no thread",
    ),
    ForeignClass(
        ("uvicorn.workers.UvicornWorker", "uvicorn.workers.UvicornH11Worker", "uvicorn_worker.UvicornWorker",
         "uvicorn_worker.UvicornH11Worker", "uvicorn.workers:UvicornWorker", "uvicorn_worker:UvicornWorker", "uvicorn",
         "uvicorn_worker", "daphne", "hypercorn"),
        "-k asgi", "or leave -k out",
    ),
    ForeignClass(("gunicorn.workers.sync.SyncWorker", "gunicorn", "uwsgi"), "-k wsgi", "or leave -k out"),
)  # fmt: skip


def refusal(name: str) -> str | None:
    """What to answer to an option, as it was typed without its value; None: nobody has it."""
    rows = [row for row in REFUSED if name in row.names]
    if not rows:
        return None
    if len(rows) > 1:
        ways = "; ".join(f"of {_and(row.whose)}: {_mend(row)}" for row in rows)
        return f"prefork has no option {name} ({ways})"
    return f"prefork has no option {name} of {_and(rows[0].whose)}; {_mend(rows[0])}"


def class_refusal(name: str) -> str | None:
    """What to answer to a worker class of another server; None: it is of none."""
    for row in CLASSES:
        if name in row.names:
            why = f" ({row.why})" if row.why else ""
            return f"worker_class: {name!r} is a class of another server; type {row.instead}{why}"
    return None


def _mend(row: ForeignOption) -> str:
    if not row.instead:
        return row.why
    return f"type {row.instead}" + (f" ({row.why})" if row.why else "")


def _and(words: tuple[str, ...]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
